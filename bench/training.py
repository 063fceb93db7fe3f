"""Training speed and memory beside transformers' PhiForCausalLM: the same shape, data, batch and
optimizer.

    python bench/training.py --shapes mid tiny --dtypes float32 bfloat16

Each side is a process of its own on the same core(s), and the sides take turns. A step is forward,
loss, backward, clipping and one optimizer step on rows of random tokens without padding.

    nanophi        this repository
    hf             transformers with sdpa attention and its own loss
    hf-compile     the same under torch.compile
    hf-adafactor   the same with the original's Adafactor instead of AdamW

Speed is the median of the steps behind the first two. Memory is the peak beyond what the process
held with everything imported.
"""

import json
import os
import statistics
import sys
import time
from dataclasses import dataclass

from machine import cpu_has, cpu_name, measured_alone, memory_gb
from table import print_head, print_row

from nanophi.cli import flag, run_command

# Name -> fields that both PhiConfigs have. A row has max_position_embeddings tokens.
SHAPES = {
    "mid": {
        "hidden_size": 960,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "vocab_size": 32768,
        "max_position_embeddings": 512,
    },
    "tiny": {
        "hidden_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "intermediate_size": 1024,
        "vocab_size": 6400,
        "max_position_embeddings": 256,
    },
}
ROWS = {"mid": 4, "tiny": 16}  # of a step
SIDES = ("nanophi", "hf", "hf-compile", "hf-adafactor")


@dataclass(kw_only=True)
class Config:
    shapes: list[str] = flag(help=f"of {', '.join(SHAPES)}")
    dtypes: list[str] = flag(help="float32, or bfloat16 for autocast")
    sides: list[str] | None = flag(None, help=f"of {', '.join(SIDES)}")
    cores: int = flag(1, at_least=1, help="cores of each side")
    steps: int = flag(8, at_least=4, help="steps of each run")
    repeats: int = flag(2, at_least=1, help="runs of each side")


def main(cfg: Config) -> None:
    cores = sorted(os.sched_getaffinity(0))[-cfg.cores :]
    features = [name for name in ("avx512f", "avx512_bf16", "avx2") if cpu_has(name)]
    print(
        f"{len(cores)} core(s) of {cpu_name()} ({', '.join(features)}), "
        f"medians of {cfg.repeats} runs of {cfg.steps} steps\n"
    )
    print_head("shape", "dtype", "side", "tokens/s", "x HF", "peak GB", "of HF's")
    for shape in cfg.shapes:
        for dtype in cfg.dtypes:
            medians = compete(cfg, shape, dtype, cores)
            for side in medians:
                print_row(shape, dtype, side, *cells(medians, side))


def compete(cfg: Config, shape: str, dtype: str, cores: list[int]) -> dict[str, dict]:
    """Run all sides in turns: side -> the medians of what `work` has printed."""
    runs: dict[str, list[dict]] = {}
    for _ in range(cfg.repeats):
        for side in cfg.sides or SIDES:
            arguments = [side, shape, dtype, str(cfg.steps), str(cfg.cores)]
            measured = measured_alone(__file__, arguments, cores)
            if measured is not None:
                runs.setdefault(side, []).append(measured)
    medians = {}
    for side, measurements in runs.items():
        medians[side] = {
            key: statistics.median(one[key] for one in measurements)
            for key in ("tokens_per_s", "gb")
        }
    return medians


def cells(medians: dict[str, dict], side: str) -> list[str]:
    """Speed and memory of a side, each with its ratio to HF's; without a ratio where HF failed."""
    speed = medians[side]["tokens_per_s"]
    gb = medians[side]["gb"]
    hf = medians.get("hf")
    if hf is None:
        return [f"{speed:,.0f}", "", f"{gb:.2f}", ""]
    return [
        f"{speed:,.0f}",
        f"{speed / hf['tokens_per_s']:.2f}",
        f"{gb:.2f}",
        f"{gb / hf['gb']:.2f}",
    ]


# ---- one run, in a process of its own


def work(side: str, shape: str, dtype: str, steps: int, cores: int) -> None:
    """Train for some steps, and print speed and memory as JSON."""
    import torch

    torch.set_num_threads(cores)
    torch.manual_seed(0)
    if side != "nanophi":
        # Imported here, because an import is no part of what training takes.
        import transformers.models.phi.modeling_phi  # noqa: F401

    before_gb = memory_gb("VmRSS")
    model, backward = nanophi(shape) if side == "nanophi" else huggingface(shape, side)
    model.train()
    optimizer = optimizer_of(side, model)
    times = []
    for number in range(steps):
        ids = random_ids(shape, seed=number)
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            backward(ids)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - started)
    tokens = ROWS[shape] * SHAPES[shape]["max_position_embeddings"]
    speed = tokens / statistics.median(times[2:])
    print(json.dumps({"tokens_per_s": speed, "gb": memory_gb("VmHWM") - before_gb}))


def random_ids(shape: str, seed: int):
    """(rows, tokens of a row + 1); the last token of a row is a target alone."""
    import torch

    size = (ROWS[shape], SHAPES[shape]["max_position_embeddings"] + 1)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(7, SHAPES[shape]["vocab_size"], size, generator=generator)


def nanophi(shape: str):
    """(our model, a function that adds the gradients of ids)."""
    from nanophi.model.config import PhiConfig
    from nanophi.model.phi import Phi
    from nanophi.model.speed import speed_up
    from nanophi.train.losses import next_token_loss
    from nanophi.train.packing import Packed

    model = Phi(PhiConfig(**SHAPES[shape]))
    speed_up(model)
    context = SHAPES[shape]["max_position_embeddings"]

    def backward(ids) -> None:
        batch = Packed(list(ids.numpy()), context, ROWS[shape], 0).batch_at(0)
        loss, count, _ = next_token_loss(model, batch)
        (loss / count).backward()

    return model, backward


def huggingface(shape: str, side: str):
    """(transformers' model, a function that adds the gradients of ids)."""
    import torch
    from transformers import PhiConfig, PhiForCausalLM

    config = PhiConfig(**SHAPES[shape], use_cache=False)
    model = PhiForCausalLM._from_config(config, attn_implementation="sdpa")
    forward = torch.compile(model) if side == "hf-compile" else model

    def backward(ids) -> None:
        inputs = ids[:, :-1]
        targets = ids[:, 1:].contiguous()
        output = forward(input_ids=inputs, labels=inputs, shift_labels=targets)
        output.loss.backward()

    return model, backward


def optimizer_of(side: str, model):
    """AdamW, or the original's Adafactor."""
    if side == "hf-adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(model.parameters(), lr=1e-4, scale_parameter=False, relative_step=False)
    import torch

    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(*sys.argv[2:5], *map(int, sys.argv[5:7]))
    else:
        run_command(Config, main)
