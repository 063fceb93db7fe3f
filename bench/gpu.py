"""Training and decoding on one GPU: what pretrain.py does by itself, and what each part of it adds.

    PYTHONPATH=. python bench/gpu.py

It needs torch alone (2.10 or newer) and no network; transformers is a row where it is installed.
The rows come in the order of what they tell, each is printed when it is done, and none is begun
when the time is up (--minutes). A step is that of pretrain.py: its optimizer, its clipping, and the
next batch built while the GPU computes. Compute is bf16 over fp32 weights. Rows are packed from
random documents of 50 to 600 tokens; padding is not counted.

MFU is the share of the maker's dense bf16 peak: 6 FLOPs per matrix parameter and token, and 12 L D
per token for each token of attention. By convention those are T, the length of the row. The second
number takes the documents as they are: a token of a document of n tokens attends to n.
"""

import datetime
import gc
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any, Literal

import numpy as np
import torch
from table import print_head, print_row
from torch._inductor import config as inductor

from nanophi.cli import UserError, flag, run_command
from nanophi.infer.generate import generate
from nanophi.model.config import PhiConfig
from nanophi.model.phi import Phi
from nanophi.model.speed import speed_up
from nanophi.train.distributed import World
from nanophi.train.loop import Batches
from nanophi.train.losses import next_token_loss
from nanophi.train.optim import build_optimizers
from nanophi.train.packing import Packed
from nanophi.train.preflight import flops_per_token, matrix_parameters, peak_flops
from nanophi.train.step import training_step


@dataclass(kw_only=True)
class Config:
    minutes: float = flag(8.0, above=0, help="no row is begun when so many have passed")
    steps: int = flag(10, at_least=5, help="steps of each row; the first four are not counted")
    device: Literal["cuda", "cpu"] = flag("cuda", help="cpu: the same with tiny shapes, to try it")


@dataclass(frozen=True)
class Row:
    """What one row trains.

    tokens: of a step; at_once: of a micro-batch
    autotuned: the compiler tries kernels of its own for the products, to which it can add the gelu
    """

    preset: str = "phi2-chinese-0.2b"
    context: int = 512
    attention: str = "auto"
    compiled: bool = True
    autotuned: bool = False
    optimizer: str = "muon"
    tokens: int = 131_072
    at_once: int = 65_536
    side: str = "nanophi"


FAST = "phi2-chinese-0.35b-fast"
ROWS = [
    Row(),  # the defaults
    Row(preset=FAST),
    Row(side="transformers", optimizer="adamw"),
    Row(optimizer="adamw"),
    Row(context=2048),
    Row(preset=FAST, context=2048),
    Row(compiled=False),
    Row(compiled=False, tokens=16_384, at_once=4_096),  # the defaults of a CPU
    Row(preset=FAST, side="transformers", optimizer="adamw"),
    Row(preset=FAST, autotuned=True),
    Row(tokens=524_288),
    Row(at_once=32_768),
    Row(attention="causal"),
    Row(preset="phi2-chinese-0.35b"),
    Row(attention="sdpa"),
]


def main(cfg: Config) -> None:
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device; --device cpu tries the bench itself")
    device_name = torch.cuda.get_device_name() if cfg.device == "cuda" else "CPU"
    print(
        f"{device_name}, torch {torch.__version__}, CUDA {torch.version.cuda}, "
        f"{datetime.date.today()}\n"
    )
    end = time.monotonic() + 60 * cfg.minutes
    print_head(
        "side", "preset", "context", "attention", "", "optimizer", "tokens a step / at once",
        "tokens/s", "MFU", "by documents", "first step, s", "peak GB",
    )  # fmt: skip
    rows = iter(ROWS)
    for row in until(end, rows):
        row = row if cfg.device == "cuda" else tiny(row)
        print_row(
            row.side,
            row.preset,
            str(row.context),
            row.attention,
            "autotuned" if row.autotuned else "compiled" if row.compiled else "eager",
            row.optimizer,
            f"{row.tokens:,} / {row.at_once:,}",
            *cells_of(measure, cfg, row),
        )
    left = list(rows)
    print(f"\n{len(left)} rows were not begun\n" if left else "")
    print_head("decoding", "answers", "dtype", "tokens/s", "of what reading the weights allows")
    for answers, dtype in until(
        end + 60, iter(((1, "bfloat16"), (1, "float32"), (64, "bfloat16")))
    ):
        print_row("generate", str(answers), dtype, *cells_of(decode, cfg, answers, dtype))


def until(end: float, rows: Iterator[Any]) -> Iterator[Any]:
    """The rows that begin before the end. Those behind stay in the iterator."""
    while time.monotonic() < end:
        try:
            yield next(rows)
        except StopIteration:
            return


def cells_of(work: Any, *arguments: Any) -> list[str]:
    """What a row has found, or what went wrong: it must not cost the rows behind it."""
    try:
        return work(*arguments)
    except Exception as error:
        return [f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"]
    finally:
        torch._dynamo.reset()  # its graphs would count against the limit of the next row
        gc.collect()  # compiled blocks are in reference cycles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def tiny(row: Row) -> Row:
    return replace(row, preset="demo", context=64, tokens=512, at_once=256)


# ---- training


def measure(cfg: Config, row: Row) -> list[str]:
    torch.manual_seed(0)
    shape = PhiConfig.preset(row.preset, max_position_embeddings=row.context)
    data = random_documents(shape.vocab_size, row.context, row.tokens // row.context)
    step = transformers_step if row.side == "transformers" else our_step
    with inductor.patch(max_autotune_gemm=row.autotuned):
        seconds, tokens = timed(step(cfg, row, shape, data), cfg)
    tokens_per_s = tokens / statistics.median(seconds[4:])
    peak = peak_flops(cfg.device)
    shares = ["", ""]
    if peak is not None:
        lengths = (row.context, mean_length(data))
        shares = [f"{tokens_per_s * flops_per_token(shape, n) / peak:.1%}" for n in lengths]
    memory = torch.cuda.max_memory_allocated() / 1e9 if cfg.device == "cuda" else 0.0
    return [f"{tokens_per_s:,.0f}", *shares, f"{seconds[0]:.0f}", f"{memory:.1f}"]


def random_documents(vocabulary: int, context: int, rows: int) -> Packed:
    """Enough documents for an epoch of four steps."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(50, 600, 4 * rows * context // 300)
    documents = [rng.integers(7, vocabulary, length) for length in lengths]
    return Packed(documents, context, rows, seed=0)


def mean_length(data: Packed) -> int:
    """The tokens that a token attends to, on average: those of its piece of a document."""
    lengths = data.piece_length.astype(np.float64)
    return round(float((lengths**2).sum() / lengths.sum()))


def timed(steps: Iterator[int], cfg: Config) -> tuple[list[float], float]:
    """Seconds of each step, and the median of their tokens."""
    seconds, tokens = [], []
    for _ in range(cfg.steps):
        started = time.perf_counter()
        tokens.append(next(steps))
        if cfg.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds, statistics.median(tokens)


def our_step(cfg: Config, row: Row, shape: PhiConfig, data: Packed) -> Iterator[int]:
    """Train; yields the tokens of each step."""
    with torch.device(cfg.device):
        model = Phi(shape, row.attention).train()
    speed_up(model, compile=row.compiled)
    optimizers = build_optimizers(model, row.optimizer, 1e-4, 0.1)
    world = World(0, 1, cfg.device)
    autocast = partial(torch.autocast, cfg.device, torch.bfloat16, cache_enabled=False)
    batches = Batches(data.batch_at, world, data.batch_rows, end=cfg.steps)
    for step in count():
        batch = batches.take(step)
        training_step(
            model,
            optimizers,
            next_token_loss,
            batch,
            row.at_once // row.context,
            world,
            clip=1.0,
            autocast=autocast,
            meanwhile=partial(batches.build, step + 1),
        )
        yield batch.real_tokens


def transformers_step(cfg: Config, row: Row, shape: PhiConfig, data: Packed) -> Iterator[int]:
    """The same rows by transformers' PhiForCausalLM, compiled, with its own loss. Its documents see
    each other. It attends by flash-attn where that is installed, otherwise by torch's attention.
    """
    import importlib.util

    import transformers

    theirs = transformers.PhiConfig(
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        intermediate_size=shape.intermediate_size,
        vocab_size=shape.vocab_size,
        max_position_embeddings=row.context,
        use_cache=False,
    )
    flash = importlib.util.find_spec("flash_attn") is not None and cfg.device == "cuda"
    theirs._attn_implementation = "flash_attention_2" if flash else "sdpa"
    with torch.device(cfg.device):
        model = transformers.PhiForCausalLM(theirs).train()
    forward = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    for step in count():
        batch = data.batch_at(step)
        rows = row.at_once // row.context
        parts = [batch.cut(start, start + rows) for start in range(0, len(batch), rows)]
        for part in parts:
            ids = part.ids.to(cfg.device)
            with torch.autocast(cfg.device, torch.bfloat16):
                loss = forward(input_ids=ids, labels=ids).loss
            (loss / len(parts)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield batch.real_tokens


# ---- decoding

NEW_TOKENS = 256
BYTES_PER_S = {"H100": 3.35e12, "H200": 4.8e12, "A100": 2.0e12}  # that the makers state


def decode(cfg: Config, answers: int, dtype: str) -> list[str]:
    preset = "phi2-chinese-0.2b" if cfg.device == "cuda" else "demo"
    new_tokens = NEW_TOKENS if cfg.device == "cuda" else 8
    shape = PhiConfig.preset(preset)
    torch.manual_seed(0)
    with torch.device(cfg.device):
        model = Phi(shape).eval().to(getattr(torch, dtype))
    prompts = [list(range(7, 39))] * answers
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        generate(model, prompts, new_tokens, eos_token_id=None)
        seconds.append(time.perf_counter() - started)
    tokens_per_s = answers * new_tokens / min(seconds)
    limit = ""
    if cfg.device == "cuda":
        name = torch.cuda.get_device_name()
        weights = matrix_parameters(shape) * getattr(torch, dtype).itemsize
        bytes_per_s = next((speed for part, speed in BYTES_PER_S.items() if part in name), None)
        if bytes_per_s is not None:
            limit = f"{tokens_per_s / (answers * bytes_per_s / weights):.0%}"
    return [f"{tokens_per_s:,.0f}", limit]


if __name__ == "__main__":
    run_command(Config, main)
