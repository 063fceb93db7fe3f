"""How to cut text into words before BPE: compression of held-out text, tokens by kind, time and memory of training.

    python bench/splits.py --input DIR --characters 10000000

Trained on a seeded shuffle of the documents, measured on the next ones. gpt2 and qwen2 are what train_tokenizer.py has;
"digits by three" is qwen2's pattern with \\p{N}{1,3}, as GPT-4 and Llama 3 have it; "white space" cuts there alone.
"""

import subprocess
import sys
import time
from dataclasses import dataclass

import numpy as np
from sample import shuffled, take

from nanophi.cli import flag, peak_memory_gb, run_command
from nanophi.tokenizer.bpe import train_bpe
from nanophi.tokenizer.elsewhere import train_sentencepiece
from nanophi.tokenizer.splits import BREAK, QWEN2_SPLIT, SPLITS, Split

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


def by_regex(pattern: str):
    """A `starts` function as in tokenizer/splits.py from a regular expression."""
    import regex

    compiled = regex.compile(pattern)

    def starts(codes: np.ndarray) -> np.ndarray:
        text = codes.astype(np.uint32).tobytes().decode("utf-32-le", "surrogatepass")
        found, begin = np.zeros(len(codes), bool), 0
        for part in text.split(chr(BREAK))[:-1]:
            found[[begin + match.start() for match in compiled.finditer(part)]] = True
            begin += len(part) + 1
            found[begin - 1] = True
        return found

    return starts


def measure(cfg: Config) -> None:
    documents = shuffled(cfg.input, cfg.seed)
    texts, held_out = take(documents, cfg.characters), take(documents, cfg.held_out)
    documents.clear()
    for name, pattern in OTHERS.items():
        SPLITS[name] = Split(pattern, by_regex(pattern))
    started = time.perf_counter()
    if cfg.kind == "sentencepiece":
        tok = train_sentencepiece(texts, cfg.vocab_size)
    else:
        tok = train_bpe(
            texts,
            cfg.vocab_size,
            **{"level": "char"} if cfg.kind == "char" else {"split": cfg.kind},
        )
    seconds = time.perf_counter() - started
    gb = peak_memory_gb()
    ids = [i for found in tok.encode_batch(held_out) for i in found]
    characters, size = sum(map(len, held_out)), sum(len(text.encode()) for text in held_out)
    lost = sum(tok.decode(tok.encode(text)) != text for text in held_out[:100])
    print(
        f"| {cfg.kind} | {characters / len(ids):.3f} | {size / len(ids):.3f} | {len(set(ids)):,} | {seconds:.1f} | "
        f"{gb:.2f} | {lost} |",
        flush=True,
    )


def main(cfg: Config) -> None:
    if cfg.kind is not None:
        measure(cfg)
        return
    print(
        "| split | characters per token | bytes per token | tokens used | train s | peak GB | changed, of 100 texts |"
    )
    print("|---|---|---|---|---|---|---|", flush=True)
    for kind in KINDS:
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--kind", kind], check=False
        )
        if done.returncode:
            sys.exit(done.returncode)  # it has said why


if __name__ == "__main__":
    run_command(Config, main)
