"""From raw files to token shards: what each stage of the text room takes on one core, in time and
memory.

    python bench/text_room.py --input DIR --tokenizer out/tokenizer [--workers 2]

The stages are the commands as a user gives them. Each is a process of its own, pinned to one core
(or to --workers cores). Reading, decompressing and writing are inside of the clock.
"""

import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from machine import run_pinned
from table import print_head, print_row

from nanophi.cli import flag, run_command
from nanophi.text.corpus import read_texts

# Calls a module's main with arguments, and prints its peak memory and result instead of what the
# command itself prints.
CALL = """
import contextlib, importlib, io, json, sys
from nanophi.cli import parser_for, peak_memory_gb
module = importlib.import_module(sys.argv[1])
flags = vars(parser_for(module.Config, "").parse_args(sys.argv[2:]))
with contextlib.redirect_stdout(io.StringIO()):
    result = module.main(module.Config(**flags))
print(json.dumps([peak_memory_gb(), result]))
"""


@dataclass(kw_only=True)
class Config:
    input: list[str] = flag(help="raw documents")
    tokenizer: str = flag(help="directory of train_tokenizer.py")
    workers: int = flag(1, at_least=1, help="processes and cores")


@dataclass
class Stage:
    """What one command took."""

    seconds: float
    peak_gb: float
    result: dict  # what its main returns


def main(cfg: Config) -> None:
    cores = sorted(os.sched_getaffinity(0))[-cfg.workers :]
    characters = sum(map(len, read_texts(cfg.input)))
    print(f"{characters:,} characters, {len(cores)} core(s)\n")
    print_head("stage", "seconds", "characters/s", "tokens/s", "peak GB")
    stages = run_stages(cfg, cores)
    tokens = stages["shards"].result["tokens"]
    for name, stage in stages.items():
        print_row(
            name,
            f"{stage.seconds:.1f}",
            f"{characters / stage.seconds:,.0f}",
            f"{tokens / stage.seconds:,.0f}",
            f"{stage.peak_gb:.2f}",
        )
    repeated = stages["dedup"].result["repeated"]
    print(f"\n{tokens:,} tokens; of the documents {repeated:,} were repeated")


def run_stages(cfg: Config, cores: list[int]) -> dict[str, Stage]:
    """Each stage reads what the one before it has written; "all" is the sum of the three."""
    stages = {}
    with tempfile.TemporaryDirectory() as folder:
        cleaned = str(Path(folder) / "clean.jsonl")
        unique = str(Path(folder) / "unique.jsonl")
        tokens = str(Path(folder) / "tokens")
        workers = ["--workers", str(cfg.workers)]
        stages["clean"] = run_stage(
            cores, "clean", ["--input", *cfg.input, "--out", cleaned, *workers]
        )
        stages["dedup"] = run_stage(cores, "dedup", ["--input", cleaned, "--out", unique, *workers])
        stages["shards"] = run_stage(
            cores,
            "shards",
            ["--input", unique, "--tokenizer", cfg.tokenizer, "--out", tokens, *workers],
        )
    seconds = sum(stage.seconds for stage in stages.values())
    peak_gb = max(stage.peak_gb for stage in stages.values())
    stages["all"] = Stage(seconds, peak_gb, {})
    return stages


def run_stage(cores: list[int], module: str, arguments: list[str]) -> Stage:
    """Run one command, `python -m nanophi.text.MODULE ARGUMENTS`."""
    started = time.perf_counter()
    command = [sys.executable, "-c", CALL, f"nanophi.text.{module}", *arguments]
    done = run_pinned(command, cores, threads=1, check=True)
    peak_gb, result = json.loads(done.stdout)
    return Stage(time.perf_counter() - started, peak_gb, result)


if __name__ == "__main__":
    run_command(Config, main)
