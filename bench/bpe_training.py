"""BPE training beside the Rust trainers: time, peak memory, and whether the merges are HF's.

    pip install rustbpe gigatoken bpeasy sentencepiece          (whatever is missing gets no row)
    python bench/bpe_training.py --input DIR --characters 10000000 --cores 1 --repeats 3

A seeded shuffle of the documents, the same for all. Each run is a process of its own, pinned to --cores cores. Reading
the documents is outside the clock, everything from the list of documents (gigatoken takes one buffer) to the merges is
inside. Memory is the process's peak beyond what it held when the clock started. Medians over --repeats, taking turns.
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

from nanophi.cli import flag, run_command
from nanophi.text.corpus import read_texts

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPECIALS = ["[PAD]", "[EOS]", "[SEP]", "[BOS]", "[CLS]", "[MASK]", "[UNK]"]


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
        vocab_size=vocab_size, min_frequency=min_frequency, special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    hf.train_from_iterator(iter(texts), trainer)
    spell = ByteLevel().bytes_of
    return [(spell(a), spell(b)) for a, b in json.loads(hf.to_str())["model"]["merges"]]


def rustbpe(texts: list[str], vocab_size: int, min_frequency: int) -> list:
    import rustbpe

    tok = rustbpe.Tokenizer()
    tok.train_from_iterator(iter(texts), vocab_size - len(SPECIALS), pattern=GPT2)
    return []  # its merges break ties otherwise


def gigatoken(texts: bytes, vocab_size: int, min_frequency: int) -> list:
    import gigatoken

    return gigatoken.train_bpe(texts, vocab_size - len(SPECIALS), [], separator=b"\0")[1]


def sentencepiece(texts: list[str], vocab_size: int, min_frequency: int) -> list:
    import sentencepiece

    with tempfile.TemporaryDirectory() as out:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_prefix=f"{out}/m", model_type="bpe", vocab_size=vocab_size,
            byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
            add_dummy_prefix=False, max_sentence_length=10**9, num_threads=len(os.sched_getaffinity(0)),
            minloglevel=2, character_coverage=0.9995,
        )  # fmt: skip
    return []


def bpeasy(texts: list[str], vocab_size: int, min_frequency: int) -> list:
    import bpeasy

    bpeasy.train_bpe(iter(texts), GPT2, 10_000, vocab_size - len(SPECIALS))
    return []


CONTESTANTS = {
    f.__name__: f for f in (nanophi, huggingface, rustbpe, gigatoken, sentencepiece, bpeasy)
}


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


def memory_gb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e9


def work(name: str, path: str, vocab_size: int, min_frequency: int) -> None:
    """One contestant's run, in a process of its own."""
    data = Path(path).read_bytes()
    texts = data if name == "gigatoken" else data.decode().split("\0")
    del data
    importlib.import_module(
        {"nanophi": "nanophi.tokenizer.fast.merges", "huggingface": "tokenizers"}.get(name, name)
    )
    before = memory_gb("VmRSS")
    started, cpu = time.perf_counter(), time.process_time()
    merges = CONTESTANTS[name](texts, vocab_size, min_frequency)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    digest = (
        hashlib.sha1(repr([tuple(map(bytes, pair)) for pair in merges]).encode()).hexdigest()
        if merges
        else ""
    )
    print(
        json.dumps(
            {
                "seconds": seconds,
                "cpu": cpu,
                "gb": memory_gb("VmHWM") - before,
                "merges": len(merges),
                "digest": digest,
            }
        )
    )


def compete(cfg: Config, texts: list[str], cores: list[int]) -> dict[str, list[dict]]:
    """Every contestant's runs on the same texts: {name: [what `work` printed, ...]}."""
    environment = os.environ | {
        "RAYON_NUM_THREADS": str(len(cores)),
        "OMP_NUM_THREADS": str(len(cores)),
    }
    found: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "documents"
        path.write_bytes("\0".join(texts).encode())
        for _ in range(cfg.repeats):
            for name in cfg.only or CONTESTANTS:
                arguments = [name, str(path), str(cfg.vocab_size), str(cfg.min_frequency)]
                done = subprocess.run(
                    [sys.executable, __file__, "--work", *arguments],
                    env=environment, capture_output=True, text=True, check=False,
                    preexec_fn=lambda: os.sched_setaffinity(0, cores),
                )  # fmt: skip
                if done.returncode == 0:
                    found.setdefault(name, []).append(json.loads(done.stdout.splitlines()[-1]))
                    print(name, found[name][-1], file=sys.stderr)
                else:
                    print(f"{name}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
    return found


def table(found: dict[str, list[dict]]) -> str:
    """Medians of the times, maxima of the memory."""
    seconds = {
        name: statistics.median(row["seconds"] for row in rows) for name, rows in found.items()
    }
    gb = {name: max(row["gb"] for row in rows) for name, rows in found.items()}
    reference = found.get("huggingface", [{}])[0].get("digest")
    lines = [
        "| trainer | seconds | x ours | peak GB | x ours | merges as HF's |",
        "|---|---|---|---|---|---|",
    ]
    for name, rows in found.items():
        digest = rows[0]["digest"]
        same = "" if not digest or not reference else "yes" if digest == reference else "NO"
        times, sizes = seconds[name] / seconds["nanophi"], gb[name] / gb["nanophi"]
        lines.append(
            f"| {name} | {seconds[name]:.1f} | {times:.1f} | {gb[name]:.2f} | {sizes:.1f} | {same} |"
        )
    return "\n".join(lines)


def draw(growth: dict[int, dict[str, list[dict]]], path: str) -> None:
    """CPU seconds (which other work disturbs less) and gigabytes against characters, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, unit in zip(axes, ("cpu", "gb"), strict=True):
        for name in {name: None for found in growth.values() for name in found}:
            sizes = [size for size in growth if name in growth[size]]
            axis.loglog(
                sizes,
                [statistics.median(r[unit] for r in growth[n][name]) for n in sizes],
                "o-",
                label=name,
            )
        axis.set(xlabel="characters", title={"cpu": "CPU seconds", "gb": "peak GB"}[unit])
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)


def main(cfg: Config) -> None:
    documents = [text.replace("\0", "") for text in read_texts(cfg.input)]
    random.Random(cfg.seed).shuffle(documents)
    cores = sorted(os.sched_getaffinity(0))[: cfg.cores]
    cpu = Path("/proc/cpuinfo").read_text()
    model = next(
        (line.split(": ")[-1] for line in cpu.splitlines() if "model name" in line), "unknown CPU"
    )
    growth = {}
    for characters in cfg.characters:
        texts, left = [], characters
        for document in documents:
            if left <= 0:
                break
            texts.append(document[:left])
            left -= len(texts[-1])
        print(
            f"\n{sum(map(len, texts)):,} characters, {len(cores)} core(s) of {model}, "
            f"{'AVX-512' if 'avx512f' in cpu else 'no AVX-512'}; {cfg.repeats} run(s) each\n"
        )
        growth[characters] = compete(cfg, texts, cores)
        print(table(growth[characters]), flush=True)
    if cfg.plot:
        draw(growth, cfg.plot)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
    else:
        run_command(Config, main)
