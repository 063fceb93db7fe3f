"""BPE training beside the Rust trainers: time, peak memory, and whether the merges are HF's.

    pip install rustbpe gigatoken bpeasy sentencepiece          (what is missing gets no row)
    python bench/bpe_training.py --input DIR --characters 10000000 --cores 1 --repeats 3

All contestants get the same documents, shuffled by a seed. Each run is a process of its own, pinned
to --cores cores. The clock starts with the list of documents in memory (gigatoken takes one buffer)
and ends with the merges. Memory is the peak of the process beyond what it held when the clock
started. Times are medians over --repeats; the contestants take turns.

Read in this order: the contestants, `work` (one run), `compete` (all runs), the table.
"""

import hashlib
import importlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from machine import cpu_has, cpu_name, memory_gb, run_pinned
from table import print_head, print_row

from nanophi.cli import flag, run_command
from nanophi.text.corpus import read_texts

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPECIALS = ["[PAD]", "[EOS]", "[SEP]", "[BOS]", "[CLS]", "[MASK]", "[UNK]"]


# ---- the contestants: texts -> merges as pairs of bytes; [] where they cannot be compared


def nanophi(texts: list[str], vocab_size: int, min_frequency: int, level: str = "byte") -> list:
    from nanophi.tokenizer.bpe import train_bpe

    tok = train_bpe(iter(texts), vocab_size, min_frequency, level)
    return [(tok.id_to_bytes[a], tok.id_to_bytes[b]) for a, b in tok.merge_list]


def huggingface(texts: list[str], vocab_size: int, min_frequency: int) -> list:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    from nanophi.tokenizer.levels import ByteLevel

    hf = Tokenizer(models.BPE())
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    hf.train_from_iterator(iter(texts), trainer)
    bytes_of = ByteLevel().bytes_of
    merges = json.loads(hf.to_str())["model"]["merges"]
    return [(bytes_of(a), bytes_of(b)) for a, b in merges]


def rustbpe(texts: list[str], vocab_size: int, min_frequency: int) -> list:
    import rustbpe

    tok = rustbpe.Tokenizer()
    tok.train_from_iterator(iter(texts), vocab_size - len(SPECIALS), pattern=GPT2)
    return []  # It breaks ties between equally frequent pairs in another way than HF.


def gigatoken(texts: bytes, vocab_size: int, min_frequency: int) -> list:
    import gigatoken

    _, merges = gigatoken.train_bpe(texts, vocab_size - len(SPECIALS), [], separator=b"\0")
    return merges


def sentencepiece(texts: list[str], vocab_size: int, min_frequency: int) -> list:
    import sentencepiece

    with tempfile.TemporaryDirectory() as out:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_prefix=f"{out}/m",
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            max_sentence_length=10**9,
            num_threads=len(os.sched_getaffinity(0)),
            minloglevel=2,
            character_coverage=0.9995,
        )
    return []


def bpeasy(texts: list[str], vocab_size: int, min_frequency: int) -> list:
    import bpeasy

    bpeasy.train_bpe(iter(texts), GPT2, 10_000, vocab_size - len(SPECIALS))
    return []


CONTESTANTS = {
    f.__name__: f for f in (nanophi, huggingface, rustbpe, gigatoken, sentencepiece, bpeasy)
}

# What a contestant imports, where that is not its own name. `work` imports it before the clock.
MODULES = {"nanophi": "nanophi.tokenizer.fast.merges", "huggingface": "tokenizers"}


@dataclass(kw_only=True)
class Config:
    input: list[str] = flag(help="documents: files, directories or globs")
    characters: list[int] = flag(help="characters to train on, one table for each")
    vocab_size: int = flag(40960, help="tokens, 7 special ones among them")
    min_frequency: int = flag(2, help="of nanophi and HF; the others have no such setting")
    cores: int = flag(1, at_least=1, help="cores of each process")
    repeats: int = flag(3, at_least=1, help="runs of each contestant")
    only: list[str] | None = flag(None, help=f"some of {', '.join(CONTESTANTS)}")
    seed: int = flag(0, help="order of the documents")
    plot: str | None = flag(None, help="draw time and memory against size into this .png")


def main(cfg: Config) -> None:
    documents = [text.replace("\0", "") for text in read_texts(cfg.input)]
    random.Random(cfg.seed).shuffle(documents)
    cores = sorted(os.sched_getaffinity(0))[: cfg.cores]
    growth = {}
    for characters in cfg.characters:
        texts = first_characters(documents, characters)
        print(
            f"\n{sum(map(len, texts)):,} characters, {len(cores)} core(s) of {cpu_name()}, "
            f"{'AVX-512' if cpu_has('avx512f') else 'no AVX-512'}; {cfg.repeats} run(s) each\n"
        )
        growth[characters] = compete(cfg, texts, cores)
        print_table(growth[characters])
    if cfg.plot:
        draw(growth, cfg.plot)


def first_characters(documents: list[str], characters: int) -> list[str]:
    """The first documents that have `characters` together, the last one cut."""
    texts = []
    left = characters
    for document in documents:
        if left <= 0:
            break
        texts.append(document[:left])
        left -= len(texts[-1])
    return texts


# ---- one run, in a process of its own


def work(name: str, path: str, vocab_size: int, min_frequency: int) -> None:
    """Train once, and print the measurements as one line of JSON."""
    texts = read_documents(name, path)
    importlib.import_module(MODULES.get(name, name))
    before_gb = memory_gb("VmRSS")
    cpu_started = time.process_time()
    started = time.perf_counter()
    merges = CONTESTANTS[name](texts, vocab_size, min_frequency)
    measured = {
        "seconds": time.perf_counter() - started,
        "cpu": time.process_time() - cpu_started,
        "gb": memory_gb("VmHWM") - before_gb,
        "merges": len(merges),
        "digest": digest(merges),
    }
    print(json.dumps(measured))


def read_documents(name: str, path: str) -> list[str] | bytes:
    """The documents of a file, which separates them by \\0; gigatoken takes the file as it is."""
    data = Path(path).read_bytes()
    return data if name == "gigatoken" else data.decode().split("\0")


def digest(merges: list) -> str:
    """The same string for the same merges; empty where there are none to compare."""
    if not merges:
        return ""
    pairs = [tuple(map(bytes, pair)) for pair in merges]
    return hashlib.sha1(repr(pairs).encode()).hexdigest()


# ---- all runs


def compete(cfg: Config, texts: list[str], cores: list[int]) -> dict[str, list[dict]]:
    """Contestant -> what `work` has printed in each of its runs on the same texts."""
    results: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "documents"
        path.write_bytes("\0".join(texts).encode())
        for _ in range(cfg.repeats):
            for name in cfg.only or CONTESTANTS:
                arguments = [name, str(path), str(cfg.vocab_size), str(cfg.min_frequency)]
                measured = run_once(arguments, cores)
                if measured is not None:
                    results.setdefault(name, []).append(measured)
    return results


def run_once(arguments: list[str], cores: list[int]) -> dict | None:
    """Run `work` in a process of its own. None where it fails: most often it is not installed."""
    name = arguments[0]
    done = run_pinned(
        [sys.executable, __file__, "--work", *arguments],
        cores,
        threads=len(cores),
        stderr=subprocess.PIPE,
        check=False,
    )
    if done.returncode != 0:
        print(f"{name}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    measured = json.loads(done.stdout.splitlines()[-1])
    print(name, measured, file=sys.stderr)
    return measured


# ---- the table and the picture


def print_table(results: dict[str, list[dict]]) -> None:
    """A row for each contestant: the median of its times and the largest of its peaks."""
    reference = results.get("huggingface", [{}])[0].get("digest")
    our_seconds, our_gb = summary(results["nanophi"])
    print_head("trainer", "seconds", "x ours", "peak GB", "x ours", "merges as HF's")
    for name, runs in results.items():
        seconds, gb = summary(runs)
        print_row(
            name,
            f"{seconds:.1f}",
            f"{seconds / our_seconds:.1f}",
            f"{gb:.2f}",
            f"{gb / our_gb:.1f}",
            same_as(reference, runs[0]["digest"]),
        )


def summary(runs: list[dict]) -> tuple[float, float]:
    """(median of the seconds, largest peak in GB)."""
    return statistics.median(run["seconds"] for run in runs), max(run["gb"] for run in runs)


def same_as(reference: str | None, merges: str) -> str:
    """Whether two digests are equal: yes, NO, or empty where one of them is missing."""
    if not merges or not reference:
        return ""
    return "yes" if merges == reference else "NO"


def draw(growth: dict[int, dict[str, list[dict]]], path: str) -> None:
    """Draw CPU seconds and gigabytes against characters, both axes logarithmic.

    CPU seconds, because other work on the machine disturbs them less than those of the clock.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(name for results in growth.values() for name in results))
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    titles = {"cpu": "CPU seconds", "gb": "peak GB"}
    for axis, (unit, title) in zip(axes, titles.items(), strict=True):
        for name in names:
            sizes = [size for size in growth if name in growth[size]]
            medians = [statistics.median(run[unit] for run in growth[n][name]) for n in sizes]
            axis.loglog(sizes, medians, "o-", label=name)
        axis.set(xlabel="characters", title=title)
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
    else:
        run_command(Config, main)
