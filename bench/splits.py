"""How to cut text into words before BPE: compression of held-out text, tokens used there, time and
memory of training.

    python bench/splits.py --input DIR --characters 10000000

Trained on documents shuffled by a seed, measured on the next ones. gpt2 and qwen2 are the splits
that train_tokenizer.py has. "digits by three" is qwen2's pattern with \\p{N}{1,3}, as GPT-4 and
Llama 3 have it. "white space" cuts at white space alone.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from sample import shuffled, take
from table import print_head, print_row

from nanophi.cli import flag, peak_memory_gb, run_command
from nanophi.tokenizer.bpe import train_bpe
from nanophi.tokenizer.elsewhere import train_sentencepiece
from nanophi.tokenizer.splits import BREAK, QWEN2_SPLIT, SPLITS, Split
from nanophi.tokenizer.tokenizer import Tokenizer

OTHERS = {
    "digits by three": QWEN2_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|"),
    "white space": r"\s*\S+|\s+",
}
KINDS = ["gpt2", "qwen2", *OTHERS, "char", "sentencepiece"]


@dataclass(kw_only=True)
class Config:
    input: list[str] = flag(help="documents: files, directories or globs")
    characters: int = flag(10_000_000, help="characters to train on")
    held_out: int = flag(1_000_000, help="characters of other documents to measure on")
    vocab_size: int = flag(40960, help="tokens")
    seed: int = flag(0, help="order of the documents")
    kind: str | None = flag(None, help="one row alone; each is run in a process of its own")


def main(cfg: Config) -> None:
    if cfg.kind is not None:
        measure(cfg)
        return
    print_head(
        "split",
        "characters per token",
        "bytes per token",
        "tokens used",
        "train s",
        "peak GB",
        "changed, of 100 texts",
    )
    for kind in KINDS:
        command = [sys.executable, __file__, *sys.argv[1:], "--kind", kind]
        done = subprocess.run(command, check=False)
        if done.returncode != 0:
            sys.exit(done.returncode)  # The process has printed why.


def measure(cfg: Config) -> None:
    """Train the tokenizer of --kind, and print its row."""
    documents = shuffled(cfg.input, cfg.seed)
    texts = take(documents, cfg.characters)
    held_out = take(documents, cfg.held_out)
    documents.clear()
    for name, pattern in OTHERS.items():
        SPLITS[name] = Split(pattern, starts_by_regex(pattern))
    started = time.perf_counter()
    tok = train(cfg.kind, texts, cfg.vocab_size)
    seconds = time.perf_counter() - started
    gb = peak_memory_gb()

    ids = [i for text_ids in tok.encode_batch(held_out) for i in text_ids]
    characters = sum(map(len, held_out))
    size = sum(len(text.encode()) for text in held_out)
    changed = sum(tok.decode(tok.encode(text)) != text for text in held_out[:100])
    print_row(
        cfg.kind,
        f"{characters / len(ids):.3f}",
        f"{size / len(ids):.3f}",
        f"{len(set(ids)):,}",
        f"{seconds:.1f}",
        f"{gb:.2f}",
        str(changed),
    )


def train(kind: str, texts: list[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of one of KINDS."""
    if kind == "sentencepiece":
        return train_sentencepiece(texts, vocab_size)
    if kind == "char":
        return train_bpe(texts, vocab_size, level="char")
    return train_bpe(texts, vocab_size, split=kind)


def starts_by_regex(pattern: str) -> Callable[[np.ndarray], np.ndarray]:
    """A `starts` function, as in tokenizer/splits.py, from a regular expression.

    >>> codes = np.array([ord("a"), ord(" "), ord("b"), BREAK])
    >>> starts_by_regex(r"\\S+|\\s+")(codes).tolist()
    [True, True, True, True]
    """
    import regex

    compiled = regex.compile(pattern)

    def starts(codes: np.ndarray) -> np.ndarray:
        text = codes.astype(np.uint32).tobytes().decode("utf-32-le", "surrogatepass")
        mask = np.zeros(len(codes), bool)
        begin = 0
        for part in text.split(chr(BREAK))[:-1]:
            mask[[begin + match.start() for match in compiled.finditer(part)]] = True
            begin += len(part) + 1
            mask[begin - 1] = True  # the BREAK is a word of its own
        return mask

    return starts


if __name__ == "__main__":
    run_command(Config, main)
