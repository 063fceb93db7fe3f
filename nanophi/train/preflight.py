"""Before the first step: will it fit, how long will it take, does the batch look as it should?"""

import os
import time
from itertools import groupby, pairwise
from pathlib import Path

import torch

from nanophi.cli import UserError, duration
from nanophi.model.checkpoint import pick_device
from nanophi.model.config import PhiConfig
from nanophi.model.phi import Phi
from nanophi.tokenizer.tokenizer import Tokenizer
from nanophi.train.distributed import World, computes_in
from nanophi.train.losses import chunk_size
from nanophi.train.optim import NS_NUMBERS
from nanophi.train.packing import IGNORE, PAD, Batch

# Dense bf16 FLOP/s that the makers state; what MFU is measured against.
PEAK_FLOPS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200 NVL": 835e12, "H200": 989e12, "B200": 2250e12,
    "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12,
}  # fmt: skip
# Bytes of optimizer state a parameter: Muon keeps momentum (of matrices), AdamW two moments, Adafactor next to nothing.
STATE_BYTES = {"muon": 4.6, "adamw": 8, "adafactor": 0.1}


def contradictions(cfg) -> list[str]:
    """What no run can do: flags that exclude each other, or the device. cfg: a TrainConfig (loop.py)."""
    device = pick_device(cfg.device)
    varlen, cuda = cfg.attention == "varlen", device.startswith("cuda")
    impossible = {
        "give --steps or --epochs, not both": cfg.steps is not None and cfg.epochs is not None,
        f"--resume {cfg.resume}: it stands alone, or is `--resume auto`": cfg.resume
        not in (None, "yes", "auto"),
        "--resume goes on with what --overwrite would delete": cfg.resume == "yes"
        and cfg.overwrite,
        "--show-batch does not train, --overfit-one-batch does": cfg.show_batch
        and cfg.overfit_one_batch,
        "--shard splits the model over ranks: start them with torchrun --nproc-per-node N": cfg.shard
        and os.environ.get("WORLD_SIZE", "1") == "1",
        f"--attention varlen needs a GPU, and this is {device}": varlen and not cuda,
        "--attention varlen computes in bfloat16 or float16": varlen
        and cuda
        and computes_in(cfg, device) == "float32",
        "--attention varlen has no dropout": varlen and bool(cfg.dropout),
    }
    return [said for said, true in impossible.items() if true]


def matrix_parameters(cfg: PhiConfig) -> int:
    """Parameters that are multiplied with each token: those of the blocks' matrices and the head, not the embedding."""
    kv = cfg.num_key_value_heads * cfg.head_dim
    block = (
        2 * cfg.hidden_size**2
        + 2 * cfg.hidden_size * kv
        + 2 * cfg.hidden_size * cfg.intermediate_size
    )
    return cfg.num_hidden_layers * block + cfg.hidden_size * cfg.vocab_size


def flops_per_token(cfg: PhiConfig, context: int) -> float:
    """Forward and backward: 6 a parameter, and 12 L D T for attention (PaLM, appendix B; not halved for causality)."""
    return 6 * matrix_parameters(cfg) + 12 * cfg.num_hidden_layers * cfg.hidden_size * context


def peak_flops(device: str) -> float | None:
    """What MFU is a share of; None for a device whose peak is not in the table, such as a CPU."""
    if not device.startswith("cuda"):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def training_bytes(
    cfg: PhiConfig,
    optimizer: str,
    rows: int,
    context: int,
    half: bool,
    recompute: bool,
    shards: int = 1,
    device: str = "cpu",
) -> int:
    """Estimate of the peak: fp32 weights, gradients, optimizer states; what backward needs: the half-precision copies
    of the matrices, and of `rows` rows at once per token and layer some 10 D + F numbers, or D with --recompute; the
    head's gradient and one chunk of logits, or else what Muon computes with. Of a model in several shards each rank has
    its part of the first, and embedding and head whole while it computes."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Phi(cfg).parameters())
    width, mlp, tokens = cfg.hidden_size, cfg.intermediate_size, rows * context
    of_a_layer = (10 * width + mlp) * (2 if half else 4)
    layers = cfg.num_hidden_layers
    kept = layers * width * 4 + of_a_layer if recompute else layers * of_a_layer
    chunk = min(
        chunk_size(cfg.vocab_size, device.split(":")[0], torch.bfloat16 if half else torch.float32),
        tokens,
    )
    head = cfg.vocab_size * (width * 4 + chunk * 12)
    held = parameters * (8 + STATE_BYTES[optimizer]) / shards
    held += 2 * matrix_parameters(cfg) if half and not recompute else 0
    if shards > 1:
        held += 2 * cfg.vocab_size * width * 8
    iterated = (
        36 * min(max(NS_NUMBERS, width * mlp), layers * width * mlp) if optimizer == "muon" else 0
    )
    return int(held + max(tokens * kept + head, iterated))


def available_bytes(device: str) -> int | None:
    """Free memory of the device; None where it cannot be known."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def check_memory(
    cfg: PhiConfig,
    optimizer: str,
    rows: int,
    context: int,
    half: bool,
    recompute: bool,
    device: str,
    shards: int = 1,
) -> int:
    """The estimate, or a UserError that says what would fit."""

    def needs(optimizer: str, rows: int, recompute: bool) -> int:
        return training_bytes(cfg, optimizer, rows, context, half, recompute, shards, device)

    wanted = needs(optimizer, rows, recompute)
    free = available_bytes(device)
    if free is None or wanted <= free:
        return wanted
    advice = [
        f"{words} ({less / 1e9:.1f} GB)"
        for words, less in (
            ("--micro-batch 1", needs(optimizer, 1, recompute)),
            ("--micro-batch 1 --recompute", needs(optimizer, 1, True)),
            ("--micro-batch 1 --recompute --optimizer adafactor", needs("adafactor", 1, True)),
        )
        if less <= free
    ]
    raise UserError(
        f"training this model takes about {wanted / 1e9:.1f} GB, {free / 1e9:.1f} GB are free on {device}: "
        + (f"try {advice[0]}" if advice else "take a smaller --preset, or --layers and --width")
    )


def matrix_flops(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of matrix products on this device, measured for a tenth of a second or so."""
    size = (
        8192 if device.startswith("cuda") else 1024
    )  # large enough that waiting for the result does not count
    a = torch.randn(size, size, device=device, dtype=dtype)
    (a @ a)[0, 0].item()
    started, products = time.perf_counter(), 0
    while time.perf_counter() - started < 0.1:
        (a @ a)[0, 0].item()
        products += 1
    return products * 2 * size**3 / (time.perf_counter() - started)


def outlook(model: Phi, optimizers, cfg, batch: Batch, steps: int, world: World) -> str:
    """What a run prints before it begins: parameter groups, memory, time. cfg: a TrainConfig."""
    groups = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            count = sum(p.numel() for p in group["params"])
            decay = f"decay {group['weight_decay']:g}" if group["weight_decay"] else "no decay"
            groups.append(
                f"{type(optimizer).__name__} {count:,} in {len(group['params'])} tensors ({decay})"
            )
    context, dtype = batch.ids.shape[1], computes_in(cfg, world.device)
    rows = min(cfg.micro_batch, -(-len(batch) // world.size)) * batch.rows_per_sample
    shards = world.size if cfg.shard else 1
    shape = (
        model.cfg,
        cfg.optimizer,
        rows,
        context,
        dtype != "float32",
        cfg.recompute,
        shards,
        world.device,
    )
    work = steps * batch.ids.numel() * flops_per_token(model.cfg, context)
    reached = 0.5  # of the speed of matrix products, as small models do
    seconds = work / (reached * matrix_flops(world.device, getattr(torch, dtype)) * world.size)
    return (
        f"parameters: {'; '.join(groups)}\n"
        f"ahead: {steps:,} steps of {batch.ids.numel():,} tokens on {world.device}, about {duration(seconds)}, "
        f"peak memory about {training_bytes(*shape) / 1e9:.2f} GB"
    )


def show_batch(batch: Batch, tok: Tokenizer, documents: int = 12) -> str:
    """The first documents of a batch as text: `┃` where one begins, what is learned between ⟦ and ⟧."""
    ids, targets, lines = batch.ids.flatten().tolist(), batch.targets.flatten().tolist(), []
    for begin, end in pairwise(batch.cu_seqlens.tolist()):
        if ids[begin] == PAD:
            continue
        last = [] if targets[end - 1] == IGNORE else [targets[end - 1]]  # it stands in no input
        learned = [target != IGNORE for target in targets[begin:end]]
        learned.insert(
            0, learned[0]
        )  # nothing predicts the first one; it may be part of the second's character
        marked = groupby(
            zip(ids[begin:end] + last, learned, strict=False), key=lambda pair: pair[1]
        )
        pieces = [(flag, tok.decode([token for token, _ in group])) for flag, group in marked]
        lines.append("┃" + "".join(f"⟦{text}⟧" if flag else text for flag, text in pieces))
        if len(lines) == documents:
            break
    return "\n\n".join(lines)
