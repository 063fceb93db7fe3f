"""Encoding speed beside HF tokenizers and tiktoken: same merges, same texts, one core each.

    python bench/encoding.py --input DIR --train-characters 10000000 --characters 10000000

Cold: the first call of a fresh encoder, with what it builds from the vocabulary. (The Unicode
tables, 0.1 s, are there from training, and HF has seen 300 of the documents.)
Warm: the same texts again.
A short text: one question of some 20 characters, warm, the median of 2,000 calls.

Ours gives arrays, as nanophi.text.shards uses them, and lists. HF's encode_batch_fast gives objects
whose ids become lists when one reads them. tiktoken has a row if it is installed.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

os.environ["RAYON_NUM_THREADS"] = "1"  # read when tokenizers is imported

from sample import shuffled, take
from table import print_head, print_row
from tokenizers import Tokenizer as HFTokenizer

from nanophi.cli import flag, run_command
from nanophi.tokenizer.bpe import train_bpe
from nanophi.tokenizer.splits import GPT2_SPLIT
from nanophi.tokenizer.tokenizer import Tokenizer

QUESTION = "感冒了要怎么办？有什么药可以吃，要去医院吗？"
SPECIALS = 7  # ids of special tokens, below those of the bytes

Work = Callable[[], object]


@dataclass(kw_only=True)
class Config:
    input: list[str] = flag(help="documents: files, directories or globs")
    train_characters: int = flag(10_000_000, help="characters to train the tokenizer on")
    characters: int = flag(10_000_000, help="characters of other documents to encode")
    vocab_size: int = flag(40960, help="tokens")
    seed: int = flag(0, help="order of the documents")


def main(cfg: Config) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    documents = shuffled(cfg.input, cfg.seed)
    train_texts = take(documents, cfg.train_characters)
    texts = take(documents, cfg.characters)

    # 1. One tokenizer, loaded by all.
    with tempfile.TemporaryDirectory() as folder:
        train_bpe(train_texts, cfg.vocab_size).save(folder)
        ours = Tokenizer.load(folder)
        ours_lists = Tokenizer.load(folder)
        hf = HFTokenizer.from_file(f"{folder}/tokenizer.json")
    hf.encode_special_tokens = True

    # 2. The same ids?
    same = same_ids(ours, hf, texts[:300])
    ours._encoder = None  # cold again
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    print(
        f"{len(texts):,} documents, {megabytes:.1f} MB; ids of the first 300 as HF's: "
        f"{'yes' if same else 'NO'}"
    )

    # 3. The speeds.
    print_head("encoder", "cold MB/s", "warm MB/s", "a short text, µs")
    encoders = {
        "nanophi, arrays": (
            lambda: list(ours.encode_stream(texts)),
            lambda: ours.encode(QUESTION),
        ),
        "nanophi, lists": (
            lambda: ours_lists.encode_batch(texts),
            lambda: ours_lists.encode(QUESTION),
        ),
        "HF encode_batch_fast": (
            lambda: hf.encode_batch_fast(texts, add_special_tokens=False),
            lambda: hf.encode(QUESTION, add_special_tokens=False).ids,
        ),
        **tiktoken_row(ours, texts),
    }
    for name, (encode_texts, encode_question) in encoders.items():
        print_row(name, *speeds(encode_texts, encode_question, megabytes))


def same_ids(ours: Tokenizer, hf: HFTokenizer, texts: list[str]) -> bool:
    """Whether both encode the texts to the same ids."""
    our_ids = [ids.tolist() for ids in ours.encode_stream(texts)]
    encodings = hf.encode_batch_fast(texts, add_special_tokens=False)
    return our_ids == [encoding.ids for encoding in encodings]


def tiktoken_row(ours: Tokenizer, texts: list[str]) -> dict[str, tuple[Work, Work]]:
    """tiktoken with our vocabulary; empty where it is not installed."""
    try:
        import tiktoken
    except ImportError:
        return {}
    ranks = {ours.id_to_bytes[i]: i - SPECIALS for i in range(SPECIALS, len(ours))}
    encoding = tiktoken.Encoding(
        "own", pat_str=GPT2_SPLIT, mergeable_ranks=ranks, special_tokens={}
    )
    return {
        "tiktoken": (
            lambda: encoding.encode_ordinary_batch(texts, num_threads=1),
            lambda: encoding.encode_ordinary(QUESTION),
        )
    }


def speeds(encode_texts: Work, encode_question: Work, megabytes: float) -> list[str]:
    """The cells of a row: MB/s cold, MB/s warm, microseconds of a short text."""
    cold_s = seconds(encode_texts)
    warm_s = statistics.median(seconds(encode_texts) for _ in range(3))
    encode_question()
    short_s = statistics.median(seconds(encode_question) for _ in range(2000))
    return [f"{megabytes / cold_s:.1f}", f"{megabytes / warm_s:.1f}", f"{short_s * 1e6:.1f}"]


def seconds(work: Work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    run_command(Config, main)
