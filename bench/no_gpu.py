"""Runs a program as on an H100, where there is none: all of it but the kernels.

    python bench/no_gpu.py --count phi2-chinese-0.2b     what a training step asks of a GPU
    python bench/no_gpu.py --decode phi2-chinese-0.2b    what a token of an answer asks of it
    python bench/no_gpu.py pretrain.py --data ...        does the command get through?
    python bench/no_gpu.py -m pytest tests/test_gpu.py   what compares numbers fails here

A library of ours, no_gpu.cpp, stands where CUDA's runtime, its driver and cuBLAS would be. PyTorch
itself is the real one: its operators, its allocator with the peak of memory, its compiler, which
writes the kernels for this GPU and has them assembled. They are counted, and nobody runs them. So
numbers that come back mean nothing, and a time is that of the CPU alone.

It needs a PyTorch that is built for CUDA 13 (2.11 and 2.14 were tried), g++, and CUDA's headers
below CUDA_HOME (/usr/local/cuda). cuDNN is left out, as its library asks the driver much more.
"""

import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve()
ROOT = HERE.parents[1]
INSIDE = "NO_GPU"  # is set for the process that has the library


# ---- the library


def build(folder: Path) -> Path:
    """Compile no_gpu.cpp, with an answer to all else that PyTorch and Triton may ask."""
    source = HERE.with_suffix(".cpp")
    answered = set(re.findall(r"\b((?:__)?cu[A-Za-z]\w+)\(", source.read_text()))
    others = folder / "others.cpp"
    lines = (f'extern "C" int {name}() {{ return 0; }}\n' for name in sorted(asked() - answered))
    others.write_text("".join(lines))
    library = folder / "libcuda.so.1"
    headers = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
    options = f"-O1 -shared -fPIC -w -I{headers} -Wl,-soname,{library.name}".split()
    files = [str(source), str(others), "-o", str(library)]
    subprocess.run(["g++", *options, *files, "-ldl"], check=True)
    (folder / "libcuda.so").symlink_to(library)  # what Triton links
    return library


def missing() -> str | None:
    """What there has to be first; None where nothing is missing."""
    import torch

    headers = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include/cuda_runtime_api.h"
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is built without CUDA"
    if torch.cuda.is_available():
        return "there is a GPU: run the command itself"
    if not shutil.which("g++"):
        return "g++ is missing"
    return None if headers.exists() else f"{headers} is missing: set CUDA_HOME"


def asked() -> set[str]:
    """Functions that PyTorch's libraries leave open, and those that Triton's source calls."""
    import torch
    import triton

    names = {"cuInit"}
    for file in Path(torch.__file__).parent.glob("lib/*.so"):
        command = ["nm", "-D", "--undefined-only", file]
        table = subprocess.run(command, capture_output=True, text=True).stdout
        names |= set(re.findall(r" U ((?:__cuda|cuda|cublas)[A-Z]\w+)", table))
    driver = Path(triton.__file__).parent / "backends/nvidia/driver.c"
    return names | set(re.findall(r"\b(cu[A-Z]\w+)\(", driver.read_text()))


def run_again(words: list[str]) -> int:
    """The same command in a process that loads the library before PyTorch."""
    with tempfile.TemporaryDirectory() as folder:
        library = build(Path(folder))
        more = {
            INSIDE: "1",
            "LD_PRELOAD": str(library),
            "LD_LIBRARY_PATH": folder,
            "TRITON_LIBCUDA_PATH": folder,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        command = [sys.executable, str(HERE), *words]
        return subprocess.run(command, env=os.environ | more).returncode


# ---- inside


def inside(words: list[str]) -> None:
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cudnn.version = lambda: 90000  # so nanophi does not ask for it either
    if words[0] != "-m":
        library().no_gpu_numbers(63)  # a loss and a count of tokens are not 0
    if words[0] == "--count":
        count_training(words[1])
    elif words[0] == "--decode":
        count_decoding(words[1])
    elif words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path[0] = str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")


def library():
    """The counts of the library: no_gpu_reset, no_gpu_report, no_gpu_numbers."""
    import ctypes

    loaded = ctypes.CDLL(None)
    loaded.no_gpu_report.restype = ctypes.c_char_p
    return loaded


def counted() -> Counter[str]:
    """What has been asked since the last reset."""
    lines = library().no_gpu_report().decode().splitlines()
    counts: Counter[str] = Counter()
    for line in lines:
        number, name = line.split("\t")
        counts[name] += int(number)
    return counts


def teraflops(counts: Counter[str]) -> float:
    """Of all matrix products: 2 M N K each."""
    total = 0
    for name, number in counts.items():
        if name.startswith("product "):
            m, n, k, batch = map(int, name.split()[1:])
            total += number * 2 * m * n * k * batch
    return total / 1e12


def sizes_of_kernels() -> dict[str, float]:
    """A dict that will hold the gigabytes that each compiled kernel reads and writes, as Inductor
    counts them. It does not know that the cache of the GPU may hold some of it.
    """
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering

    config.benchmark_kernel = True  # writes the number into the kernel
    config.force_disable_caches = True  # what is in a cache is not written
    sizes: dict[str, float] = {}
    codegen = GraphLowering.codegen

    def reading(graph):
        made = codegen(graph)
        for kernel in re.split(r"^(?=triton_\w+ = async_compile)", made[0].value, flags=re.M)[1:]:
            name = kernel.split(" ", 1)[0]
            size = re.search(r"'kernel_num_gb': ([0-9.e-]+)", kernel)
            sizes[name] = max(sizes.get(name, 0.0), float(size[1]) if size else 0.0)
        return made

    GraphLowering.codegen = reading
    return sizes


def count_training(preset: str) -> None:
    """A table: a step of 65,536 tokens at once, by nanophi and by transformers, and uncompiled."""
    import gpu
    import torch
    from table import print_head, print_row

    from nanophi.model.config import PhiConfig
    from nanophi.train.preflight import training_bytes

    sizes = sizes_of_kernels()
    shape = PhiConfig.preset(preset, max_position_embeddings=512)
    data = gpu.random_documents(shape.vocab_size, 512, 128)
    print_head(
        "side", "", "optimizer", "launches", "products", "TFLOP", "GB of compiled kernels",
        "copies to the GPU", "of these wait", "waits", "peak GB", "estimated",
    )  # fmt: skip
    make = partial(gpu.Row, preset=preset, tokens=65_536)
    theirs = make(side="transformers", optimizer="adamw")
    for row in (make(), make(optimizer="adamw"), make(compiled=False), theirs):
        step = gpu.our_step if row.side == "nanophi" else gpu.transformers_step
        steps = step(gpu.Config(), row, shape, data)
        for _ in range(4):
            library().no_gpu_reset()
            next(steps)
        counts = counted()
        moved = sum(number * sizes.get(name[7:], 0) for name, number in counts.items())
        waiting = counts["copies to the GPU that wait"]
        estimate = training_bytes(
            shape, row.optimizer, 128, 512, half=True, recompute=False, device="cuda"
        )
        print_row(
            row.side,
            "compiled" if row.compiled else "eager",
            row.optimizer,
            f"{counts['launches']:,}",
            f"{sum(n for name, n in counts.items() if name.startswith('product ')):,}",
            f"{teraflops(counts):.1f}",
            f"{moved:.1f}" if row.compiled else "",
            str(counts["copies to the GPU"] + waiting),
            str(waiting),
            str(counts["waits"]),
            f"{torch.cuda.max_memory_allocated() / 1e9:.1f}",
            f"{estimate / 1e9:.1f}" if row.side == "nanophi" else "",
        )
        del steps
        gpu.cells_of(lambda: [])  # forgets graphs and memory


def count_decoding(preset: str) -> None:
    """A table: what one more token of an answer asks, by `generate` and by the engine."""
    import queue

    import torch
    from table import print_head, print_row

    from nanophi.infer.engine import Engine, Request
    from nanophi.infer.generate import generate
    from nanophi.model.config import PhiConfig
    from nanophi.model.phi import Phi

    library().no_gpu_numbers(0)  # the id of each token
    with torch.device("cuda"):
        model = Phi(PhiConfig.preset(preset)).eval().bfloat16()
    letters = SimpleNamespace(id_to_bytes=dict.fromkeys(range(model.cfg.vocab_size), b"."))
    engine = Engine(model, letters, rows=8).start()

    def by_engine(answers: int, tokens: int) -> None:
        said = [queue.SimpleQueue() for _ in range(answers)]
        for pieces in said:
            engine.submit(Request([7] * 32, pieces.put, tokens))
        for pieces in said:
            while pieces.get().finish is None:
                pass

    def by_generate(answers: int, tokens: int) -> None:
        generate(model, [[7] * 32] * answers, tokens, eos_token_id=None)

    print_head("by", "answers", "launches", "graphs played", "waits", "ms of the CPU")
    ways = ((by_generate, 1), (by_generate, 64), (by_engine, 1), (by_engine, 8))
    for answer, answers in ways:
        answer(answers, 32)
        found = []
        for tokens in (64, 320):
            library().no_gpu_reset()
            seconds = []
            for _ in range(3):
                started = time.perf_counter()
                answer(answers, tokens)
                seconds.append(time.perf_counter() - started)
            found.append((min(seconds), counted()))
        (early, few), (late, many) = found
        each = {name: (many[name] - few[name]) / 3 / 256 for name in many}
        print_row(
            answer.__name__[3:],
            str(answers),
            *(f"{each.get(name, 0):.2f}" for name in ("launches", "graphs played", "waits")),
            f"{1e3 * (late - early) / 256:.2f}",
        )
    engine.close()


def main(words: list[str]) -> int:
    if not words or (words[0] in ("--count", "--decode", "-m") and len(words) < 2):
        print(__doc__)
        return 2
    reason = missing()
    if reason is not None:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    return run_again(words)


if __name__ == "__main__":
    if INSIDE in os.environ:
        inside(sys.argv[1:])
    else:
        sys.exit(main(sys.argv[1:]))
