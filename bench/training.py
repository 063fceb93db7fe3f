"""Training speed and memory beside transformers' PhiForCausalLM: the same shape, data, batch and optimizer.

    python bench/training.py --shapes mid tiny --dtypes float32 bfloat16

Each side is a process of its own on the same core(s), sides taking turns; forward, loss, backward, clipping and one
optimizer step on rows of random tokens without padding. HF: sdpa attention, its own loss; once plain, once under
torch.compile, once with the original's Adafactor. Speed: median of the steps behind the first two. Memory: the peak
beyond what the process held with everything imported.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from nanophi.cli import flag, run_command

# width, layers, heads, MLP, vocabulary, rows, tokens of a row
SHAPES = {"mid": (960, 4, 16, 4096, 32768, 4, 512), "tiny": (256, 6, 8, 1024, 6400, 16, 256)}
SIDES = ("nanophi", "hf", "hf-compile", "hf-adafactor")


@dataclass(kw_only=True)
class Config:
    shapes: list[str] = flag(help=f"of {', '.join(SHAPES)}")
    dtypes: list[str] = flag(help="float32, or bfloat16 for autocast")
    sides: list[str] | None = flag(None, help=f"of {', '.join(SIDES)}")
    cores: int = flag(1, at_least=1, help="cores of each side")
    steps: int = flag(8, at_least=4, help="steps of each run")
    repeats: int = flag(2, at_least=1, help="runs of each side")


def build(side: str, shape: str):
    """(model, one step as a function of ids, optimizer) of a side."""
    import torch

    width, layers, heads, mlp, vocabulary, rows, time_ = SHAPES[shape]
    settings = {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": mlp,
        "vocab_size": vocabulary, "max_position_embeddings": time_,
    }  # fmt: skip
    if side == "nanophi":
        from nanophi.model.config import PhiConfig
        from nanophi.model.phi import Phi
        from nanophi.model.speed import speed_up
        from nanophi.train.losses import next_token_loss
        from nanophi.train.packing import Packed

        model = Phi(PhiConfig(**settings))
        speed_up(model)

        def step(ids):
            batch = Packed(list(ids.numpy()), time_, rows, 0).batch_at(0)
            loss, count, _ = next_token_loss(model, batch)
            (loss / count).backward()

    else:
        from transformers import PhiConfig, PhiForCausalLM

        model = PhiForCausalLM._from_config(
            PhiConfig(**settings, use_cache=False), attn_implementation="sdpa"
        )
        call = torch.compile(model) if side == "hf-compile" else model

        def step(ids):
            inputs = ids[:, :-1]
            call(
                input_ids=inputs, labels=inputs, shift_labels=ids[:, 1:].contiguous()
            ).loss.backward()

    if side == "hf-adafactor":
        from transformers.optimization import Adafactor

        optimizer = Adafactor(
            model.parameters(), lr=1e-4, scale_parameter=False, relative_step=False
        )
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    return model.train(), step, optimizer


def memory_gb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e9


def work(side: str, shape: str, dtype: str, steps: int, cores: int) -> None:
    """One side's run, in a process of its own."""
    import torch

    torch.set_num_threads(cores)
    torch.manual_seed(0)
    if side != "nanophi":
        import transformers.models.phi.modeling_phi  # noqa: F401 - not part of what training takes
    *_, vocabulary, rows, time_ = SHAPES[shape]
    before = memory_gb("VmRSS")
    model, step, optimizer = build(side, shape)
    times = []
    for number in range(steps):
        ids = torch.randint(
            7, vocabulary, (rows, time_ + 1), generator=torch.Generator().manual_seed(number)
        )
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            step(ids)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - started)
    speed = rows * time_ / statistics.median(times[2:])
    print(json.dumps({"tokens_per_s": speed, "gb": memory_gb("VmHWM") - before}))


def main(cfg: Config) -> None:
    cores = sorted(os.sched_getaffinity(0))[-cfg.cores :]
    info = Path("/proc/cpuinfo").read_text()
    model = next(
        (line.split(": ")[-1] for line in info.splitlines() if "model name" in line), "unknown CPU"
    )
    kinds = [kind for kind in ("avx512f", "avx512_bf16", "avx2") if kind in info]
    print(
        f"{len(cores)} core(s) of {model} ({', '.join(kinds)}), medians of {cfg.repeats} runs of {cfg.steps} steps\n"
    )
    print("| shape | dtype | side | tokens/s | x HF | peak GB | of HF's |")
    print("|---|---|---|---|---|---|---|")
    for shape in cfg.shapes:
        for dtype in cfg.dtypes:
            found: dict[str, list[dict]] = {}
            for _ in range(cfg.repeats):
                for side in cfg.sides or SIDES:
                    arguments = [side, shape, dtype, str(cfg.steps), str(cfg.cores)]
                    done = subprocess.run(
                        [sys.executable, __file__, "--work", *arguments], capture_output=True, text=True,
                        env=os.environ | {"OMP_NUM_THREADS": str(cfg.cores)}, check=False,
                        preexec_fn=lambda: os.sched_setaffinity(0, cores),
                    )  # fmt: skip
                    if done.returncode:
                        print(f"{side}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
                    else:
                        found.setdefault(side, []).append(json.loads(done.stdout.splitlines()[-1]))
            hf = found.get("hf")
            for side, rows in found.items():
                speed, gb = (
                    statistics.median(row[key] for row in rows) for key in ("tokens_per_s", "gb")
                )
                ratios = ["", ""]
                if hf:
                    ratios = [f"{speed / statistics.median(row['tokens_per_s'] for row in hf):.2f}"]
                    ratios.append(f"{gb / statistics.median(row['gb'] for row in hf):.2f}")
                print(
                    f"| {shape} | {dtype} | {side} | {speed:,.0f} | {ratios[0]} | {gb:.2f} | {ratios[1]} |",
                    flush=True,
                )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(*sys.argv[2:5], *map(int, sys.argv[5:7]))
    else:
        run_command(Config, main)
