"""From raw files to token shards: what each stage of the text room takes on one core, time and memory.

    python bench/text_room.py --input DIR --tokenizer out/tokenizer [--workers 2]

The commands as a user gives them, each a process of its own, pinned to one core (or --workers of them); reading,
decompressing and writing are inside.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from nanophi.cli import flag, run_command
from nanophi.text.corpus import read_texts

# Runs a module's main with arguments and prints its peak memory and result, without the command's own words.
CALL = """
import contextlib, importlib, io, json, sys
from nanophi.cli import parser_for, peak_memory_gb
module = importlib.import_module(sys.argv[1])
with contextlib.redirect_stdout(io.StringIO()):
    result = module.main(module.Config(**vars(parser_for(module.Config, "").parse_args(sys.argv[2:]))))
print(json.dumps([peak_memory_gb(), result]))
"""


@dataclass(kw_only=True)
class Config:
    input: list[str] = flag(help="raw documents")
    tokenizer: str = flag(help="directory of train_tokenizer.py")
    workers: int = flag(1, at_least=1, help="processes and cores")


def stage(cores: list[int], module: str, *arguments: str) -> tuple[float, float, dict]:
    """(seconds, peak GB, what main returns) of one command."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", CALL, f"nanophi.text.{module}", *arguments], check=True, stdout=subprocess.PIPE,
        text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )  # fmt: skip
    gb, result = json.loads(done.stdout)
    return time.perf_counter() - started, gb, result


def main(cfg: Config) -> None:
    cores = sorted(os.sched_getaffinity(0))[-cfg.workers :]
    characters = sum(map(len, read_texts(cfg.input)))
    print(f"{characters:,} characters, {len(cores)} core(s)\n")
    print("| stage | seconds | characters/s | tokens/s | peak GB |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        cleaned, unique = str(Path(folder) / "clean.jsonl"), str(Path(folder) / "unique.jsonl")
        workers = ("--workers", str(cfg.workers))
        rows = {
            "clean": stage(cores, "clean", "--input", *cfg.input, "--out", cleaned, *workers),
            "dedup": stage(cores, "dedup", "--input", cleaned, "--out", unique, *workers),
            "shards": stage(
                cores,
                "shards",
                "--input",
                unique,
                "--tokenizer",
                cfg.tokenizer,
                "--out",
                folder + "/tokens",
                *workers,
            ),
        }
    tokens = rows["shards"][2]["tokens"]
    rows["all"] = (sum(row[0] for row in rows.values()), max(row[1] for row in rows.values()), {})
    for name, (seconds, gb, _) in rows.items():
        print(
            f"| {name} | {seconds:.1f} | {characters / seconds:,.0f} | {tokens / seconds:,.0f} | {gb:.2f} |"
        )
    print(f"\n{tokens:,} tokens; of the documents {rows['dedup'][2]['repeated']:,} were repeated")


if __name__ == "__main__":
    run_command(Config, main)
