"""Encoding speed beside HF tokenizers and tiktoken: same merges, same texts, one core each.

    python bench/encoding.py --input DIR --train-characters 10000000 --characters 10000000

Cold: the first call of a fresh encoder, what it builds from the vocabulary included (the Unicode tables, 0.1 s, are
there from training, and HF has seen 300 of the documents); warm: the same texts again. Ours gives arrays (as
text.shards uses them) and lists; HF's encode_batch_fast gives objects whose ids are lists when asked for. A short text:
one question of some 20 characters, warm, median of 2,000 calls. tiktoken has a row if it is installed.
"""

import os
import statistics
import tempfile
import time
from dataclasses import dataclass

os.environ["RAYON_NUM_THREADS"] = "1"

from sample import shuffled, take
from tokenizers import Tokenizer as HFTokenizer

from nanophi.cli import flag, run_command
from nanophi.tokenizer.bpe import train_bpe
from nanophi.tokenizer.levels import GPT2_SPLIT
from nanophi.tokenizer.tokenizer import Tokenizer

QUESTION = "感冒了要怎么办？有什么药可以吃，要去医院吗？"


@dataclass(kw_only=True)
class Config:
    input: list[str] = flag(help="documents: files, directories or globs")
    train_characters: int = flag(10_000_000, help="characters to train the tokenizer on")
    characters: int = flag(10_000_000, help="characters of other documents to encode")
    vocab_size: int = flag(40960, help="tokens")
    seed: int = flag(0, help="order of the documents")


def seconds(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main(cfg: Config) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    documents = shuffled(cfg.input, cfg.seed)
    train, texts = take(documents, cfg.train_characters), take(documents, cfg.characters)
    with tempfile.TemporaryDirectory() as folder:
        train_bpe(train, cfg.vocab_size).save(folder)
        ours, lists = Tokenizer.load(folder), Tokenizer.load(folder)
        hf = HFTokenizer.from_file(f"{folder}/tokenizer.json")
    hf.encode_special_tokens = True
    ranks = {ours.id_to_bytes[i]: i - 7 for i in range(7, len(ours))}
    rows = {
        "nanophi, arrays": (lambda: list(ours.encode_stream(texts)), lambda: ours.encode(QUESTION)),
        "nanophi, lists": (lambda: lists.encode_batch(texts), lambda: lists.encode(QUESTION)),
        "HF encode_batch_fast": (
            lambda: hf.encode_batch_fast(texts, add_special_tokens=False),
            lambda: hf.encode(QUESTION, add_special_tokens=False).ids,
        ),
    }
    try:
        import tiktoken

        tik = tiktoken.Encoding("own", pat_str=GPT2_SPLIT, mergeable_ranks=ranks, special_tokens={})
        rows["tiktoken"] = (
            lambda: tik.encode_ordinary_batch(texts, num_threads=1),
            lambda: tik.encode_ordinary(QUESTION),
        )
    except ImportError:
        pass
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    same = [ids.tolist() for ids in ours.encode_stream(texts[:300])] == [
        encoding.ids for encoding in hf.encode_batch_fast(texts[:300], add_special_tokens=False)
    ]
    ours._encoder = None  # cold again
    print(
        f"{len(texts):,} documents, {megabytes:.1f} MB; ids of the first 300 as HF's: {'yes' if same else 'NO'}"
    )
    print("| encoder | cold MB/s | warm MB/s | a short text, µs |\n|---|---|---|---|")
    for name, (batch, single) in rows.items():
        cold = seconds(batch)
        warm = statistics.median(seconds(batch) for _ in range(3))
        single()
        short = statistics.median(seconds(single) for _ in range(2000))
        print(
            f"| {name} | {megabytes / cold:.1f} | {megabytes / warm:.1f} | {short * 1e6:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    run_command(Config, main)
