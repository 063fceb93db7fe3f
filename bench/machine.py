"""What a bench runs on (Linux): its memory, its CPU, and processes pinned to some of the cores.

It imports the standard library alone, so that a process which measures memory holds little.
"""

import json
import os
import subprocess
import sys
from pathlib import Path


def memory_gb(field: str) -> float:
    """Memory of this process in GB. field: VmRSS, what it holds now, or VmHWM, its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024 / 1e9  # the kernel counts in KiB
    raise KeyError(field)


def cpu_name() -> str:
    """The model of the CPU, such as "AMD EPYC 9R14"."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if "model name" in line:
            return line.split(": ")[-1]
    return "unknown CPU"


def cpu_has(feature: str) -> bool:
    """Whether the CPU has a feature, such as "avx512f"."""
    return feature in Path("/proc/cpuinfo").read_text()


def run_pinned(
    command: list[str], cores: list[int], threads: int, **options
) -> subprocess.CompletedProcess[str]:
    """Run a command on `cores` alone, and capture what it prints.

    threads: of libraries that use OpenMP (torch, numpy) or Rayon (HF tokenizers)
    options: more arguments of subprocess.run
    """
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "RAYON_NUM_THREADS": str(threads),
    }
    return subprocess.run(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
        **options,
    )


def measured_alone(script: str, arguments: list[str], cores: list[int]) -> dict | None:
    """Run `script --work ARGUMENTS` in a process of its own: what it prints last, which is JSON.
    None where it fails, after printing why.

    arguments: the last one says how many threads
    """
    done = run_pinned(
        [sys.executable, script, "--work", *arguments],
        cores,
        threads=int(arguments[-1]),
        stderr=subprocess.PIPE,
        check=False,
    )
    if done.returncode != 0:
        print(f"{arguments[0]}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])
