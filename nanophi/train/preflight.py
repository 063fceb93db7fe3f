"""Before the first step: does it fit, how long does it take, does the batch look as it should?

The estimates ask the class Phi and the table of optimizers, so a changed block or a new optimizer
changes them too.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from nanophi.cli import UserError, duration, row_named
from nanophi.model.config import PhiConfig
from nanophi.model.phi import MLP, Phi
from nanophi.tokenizer.tokenizer import Tokenizer
from nanophi.train.distributed import World
from nanophi.train.losses import chunk_size
from nanophi.train.optim import NS_NUMBERS, OPTIMIZERS
from nanophi.train.packing import IGNORE, Batch

if TYPE_CHECKING:
    from nanophi.train.setup import Setup


# ---- operations


# Dense bf16 FLOP/s that the makers state: what model FLOPs utilisation (MFU) is measured against.
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


@dataclass(frozen=True)
class Size:
    """What the estimates need to know of a network."""

    parameters: int  # all
    matrices: int  # those that each token is multiplied with: the blocks' matrices and the head
    mlp: int  # numbers a token that the MLP of one block keeps for backward


def size_of(cfg: PhiConfig) -> Size:
    """Counted from the network itself, built without memory.

    Only one layer is built, and its numbers are taken as often as there are layers: ten thousand
    layers would take minutes, before anybody learns that they do not fit.
    """
    with torch.device("meta"):
        model = Phi(replace(cfg, num_hidden_layers=1))
    layer = model.model.layers[0]
    more_layers = cfg.num_hidden_layers - 1

    def count(*, matrices: bool) -> int:
        """The parameters of all layers; or the matrices, without the embedding, alone."""

        def size(module: nn.Module) -> int:
            return sum(
                p.numel()
                for name, p in module.named_parameters()
                if not matrices or (p.dim() == 2 and "embed" not in name)
            )

        return size(model) + more_layers * size(layer)

    kept = _kept_by_mlp(layer, cfg.hidden_size)
    return Size(count(matrices=False), count(matrices=True), kept)


def _kept_by_mlp(block: nn.Module, width: int) -> int:
    """Numbers a token that backward needs of the MLP of a block: what its layers but the last give.

    The MLP of phi.py computes its activation again (see speed.py). One without `contract` keeps
    what it makes of each layer too.
    """
    mlp = block.mlp
    assert isinstance(mlp, nn.Module)
    layers = [layer for layer in mlp.modules() if isinstance(layer, nn.Linear)]
    inner = sum(layer.out_features for layer in layers) - width  # the last one gives the width
    recomputed = isinstance(mlp, MLP) and "contract" in type(mlp).forward.__code__.co_names
    return inner if recomputed else 2 * inner


def matrix_parameters(cfg: PhiConfig) -> int:
    """Parameters that each token is multiplied with: those of the blocks' matrices and the head."""
    return size_of(cfg).matrices


def flops_per_token(cfg: PhiConfig, context: int) -> float:
    """Forward and backward: 6 per matrix parameter, and 12 L D T for attention (PaLM, appendix B;
    not halved for causality).
    """
    attention = 12 * cfg.num_hidden_layers * cfg.hidden_size * context
    return 6 * matrix_parameters(cfg) + attention


def peak_flops(device: str) -> float | None:
    """The peak of a device; None where the table lacks it, as for a CPU."""
    if not device.startswith("cuda"):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def mfu_by_speed(model: Phi, batch: Batch, world: World) -> Callable[[float], dict[str, float]]:
    """A function tokens/s -> {"mfu": share of the peak}; {} where the peak is not known."""
    flops = flops_per_token(model.cfg, batch.ids.shape[1])
    peak = peak_flops(world.device)
    if peak is None:
        return lambda tokens_per_s: {}
    return lambda tokens_per_s: {"mfu": round(tokens_per_s * flops / (peak * world.size), 4)}


# ---- memory


def training_bytes(
    cfg: PhiConfig,
    optimizer: str,
    rows: int,
    context: int,
    half: bool,
    recompute: bool,
    shards: int = 1,
    device: str = "cpu",
    attention: str = "auto",
    accumulates: bool = False,
) -> int:
    """Estimate of the peak, in bytes.

    rows:   rows of `context` tokens that are computed at once
    half:   whether the computation is in bf16 or fp16
    shards: ranks that split the model; the estimate is that of one of them
    accumulates: a step has several micro-batches. Between them a rank holds whole gradients of a
            split model, which are summed over the ranks once
    """
    size = size_of(cfg)
    tokens = rows * context
    width = cfg.hidden_size
    layers = cfg.num_hidden_layers
    head = cfg.vocab_size * width

    # Held all the time: fp32 weights and gradients, and what the optimizer keeps.
    choice = row_named(OPTIMIZERS, optimizer, "optimizer")
    held = size.parameters * (4 + 4 + choice.state_bytes) / shards
    if half and not recompute:
        held += size.matrices * 2  # the half-precision copies that backward needs
    if shards > 1:
        held += 2 * head * 8  # embedding and head are whole while the model computes
        held += size.parameters * 4 * accumulates

    # Held from forward to backward, for each token and layer: some 10 D numbers and what the MLP
    # keeps. With --recompute only the layer's input, and one layer at a time in full.
    of_a_layer = (10 * width + size.mlp) * (2 if half else 4)
    if attention == "manual":  # the attention weights: in fp32, and in half precision beside it
        of_a_layer += cfg.num_attention_heads * context * (6 if half else 4)
    kept = layers * of_a_layer
    if recompute:
        kept = layers * width * 4 + of_a_layer
    dtype = torch.bfloat16 if half else torch.float32
    chunk = min(chunk_size(cfg.vocab_size, device.split(":")[0], dtype), tokens)
    loss = head * 4 + cfg.vocab_size * chunk * 12  # the head's gradient; a chunk of logits, thrice
    passes = tokens * kept + loss

    # After backward, Muon iterates with many matrices at once.
    largest = width * cfg.intermediate_size
    at_once = min(max(NS_NUMBERS, largest), layers * largest)
    return int(held + max(passes, choice.iteration_bytes * at_once))


def available_bytes(device: str) -> int | None:
    """Free memory of the device; None where it cannot be known."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    sizes = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    return sizes[0] if sizes else None


def check_memory(
    cfg: PhiConfig,
    optimizer: str,
    rows: int,
    context: int,
    half: bool,
    recompute: bool,
    device: str,
    shards: int = 1,
    attention: str = "auto",
    fewest_rows: int = 1,
    loaded: int = 0,
    accumulates: bool = False,
) -> int:
    """The estimate of `training_bytes`, or a UserError that says what would fit.

    fewest_rows: that can be computed at once, two of a preference pair
    loaded:      bytes of it that the process has taken already
    """

    def needs(optimizer: str, rows: int, recompute: bool) -> int:
        several = accumulates or rows < at_once
        return training_bytes(
            cfg, optimizer, rows, context, half, recompute, shards, device, attention, several
        )

    at_once = rows
    needed = needs(optimizer, rows, recompute)
    free = available_bytes(device)
    if free is None or needed <= free + loaded:
        return needed
    free += loaded
    smaller = {
        "--micro-batch 1": needs(optimizer, fewest_rows, recompute),
        "--micro-batch 1 --recompute": needs(optimizer, fewest_rows, True),
        "--micro-batch 1 --recompute --optimizer adafactor": needs("adafactor", fewest_rows, True),
    }
    fits = [f"{flags} ({size / 1e9:.1f} GB)" for flags, size in smaller.items() if size <= free]
    smaller_model = "take a smaller --preset, or --layers and --width, in pretrain.py"
    advice = f"try {fits[0]}" if fits else f"{smaller_model}; or a shorter --context"
    raise UserError(
        f"training this model takes about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free on "
        f"{device}: {advice}"
    )


# Tokens computed at once beyond which a GPU should not get faster: its products are large enough.
ENOUGH_TOKENS = 65_536
# The share of the free memory that the default --micro-batch fills, as estimates are estimates.
FILLED = 0.8


def fit(
    shape: PhiConfig,
    setup: "Setup",
    samples: int,
    context: int,
    rows_per_sample: int = 1,
    model: Phi | None = None,
) -> "Setup":
    """The setup with a --micro-batch where none is given. A UserError where the training of a run
    takes more memory than its device has.

    On a GPU it is as many samples as fill the memory or ENOUGH_TOKENS, so that all micro-batches of
    a step are of one size:

        a rank has 100 samples, 40 fit at once    ->    34, 34, 32

    samples: rows, or preference pairs, of a step over all ranks; rows_per_sample: 2 for pairs
    context: tokens of a row
    model:   where it is loaded already; the weights then are not to be counted twice
    """
    cfg = setup.cfg
    device = setup.world.device
    samples_of_a_rank = -(-samples // setup.world.size)
    loaded = 0
    if model is not None and device.startswith(model.device.type):
        loaded = 4 * model.num_parameters()
    common: dict[str, Any] = {
        "half": setup.dtype != "float32",
        "recompute": cfg.recompute,
        "device": device,
        "shards": setup.ranks_of_model,
        "attention": cfg.attention,
    }
    at_once = cfg.micro_batch
    if at_once is None:

        def fits(samples: int) -> bool:
            free = available_bytes(device)
            rows = samples * rows_per_sample
            several = samples < samples_of_a_rank
            needed = training_bytes(
                shape, cfg.optimizer, rows, context, accumulates=several, **common
            )
            return free is None or needed < FILLED * (free + loaded)

        at_once = max(ENOUGH_TOKENS // (context * rows_per_sample), 1)
        while at_once > 1 and not fits(at_once):
            at_once = at_once * 7 // 8
        at_once = min(setup.world.gather(at_once))  # ranks of a model that is split do the same
        micro_steps = -(-samples_of_a_rank // at_once)
        at_once = -(-samples_of_a_rank // micro_steps)
    rows = min(at_once, samples_of_a_rank) * rows_per_sample
    check_memory(
        shape,
        cfg.optimizer,
        rows,
        context,
        fewest_rows=rows_per_sample,
        loaded=loaded,
        accumulates=at_once < samples_of_a_rank,
        **common,
    )
    return setup.changed(micro_batch=at_once)


# Below so many tokens a step and GPU, the model being large, Python takes longer than the GPU.
FEW_TOKENS = 32_768
STEP_OF_SMALL_MODELS = 16_384  # tokens, on any device


def tokens_of_a_step(shape: PhiConfig, world: World) -> int:
    """The default of --batch-tokens: what a small model learns best with on a CPU; on GPUs so much
    for a large one that each has enough to do.
    """
    large = size_of(shape).parameters >= 100e6
    if not (large and world.device.startswith("cuda")):
        return STEP_OF_SMALL_MODELS
    return max(131_072, FEW_TOKENS * world.size)


def note_on_few_tokens(model: Phi, batch: Batch, world: World) -> str | None:
    """A warning where the GPUs of a run will mostly wait. batch: that of a whole step"""
    each = batch.ids.numel() // world.size
    is_large = tokens_of_a_step(model.cfg, world) > STEP_OF_SMALL_MODELS
    if (
        not world.device.startswith("cuda")
        or each >= FEW_TOKENS
        or not (is_large or world.size > 1)
    ):
        return None
    return (
        f"note: each GPU computes {each:,} tokens a step. Below {FEW_TOKENS:,} it waits for Python "
        "most of the time: raise --batch-tokens (--batch-pairs), or start fewer ranks"
    )


# ---- time


def matrix_flops(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of matrix products on this device, measured for a tenth of a second or so."""
    # Many CPUs have no products in half precision, and torch takes seconds for a large one.
    size = 1024 if dtype == torch.float32 else 256
    if device.startswith("cuda"):
        size = 8192  # so large that waiting does not count
    a = torch.randn(size, size, device=device, dtype=dtype)
    (a @ a)[0, 0].item()
    products = 0
    started = time.perf_counter()
    while time.perf_counter() - started < 0.1:
        (a @ a)[0, 0].item()  # .item() waits for the device
        products += 1
    return products * 2 * size**3 / (time.perf_counter() - started)


REACHED = 0.5  # of the speed of matrix products, as small models do


def outlook(
    model: Phi, optimizers: list[Optimizer], setup: "Setup", batch: Batch, steps: int
) -> str:
    """What a run prints before it begins: parameter groups, steps, time, memory."""
    groups = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            count = sum(p.numel() for p in group["params"])
            decay = f"decay {group['weight_decay']:g}" if group["weight_decay"] else "no decay"
            name = type(optimizer).__name__
            groups.append(f"{name} {count:,} in {len(group['params'])} tensors ({decay})")

    cfg = setup.cfg
    world = setup.world
    context = batch.ids.shape[1]
    step_tokens = batch.ids.numel()
    work = steps * step_tokens * flops_per_token(model.cfg, context)
    speed = REACHED * matrix_flops(world.device, getattr(torch, setup.dtype)) * world.size
    samples = min(setup.micro_batch, -(-len(batch) // world.size))  # at once
    memory = training_bytes(
        model.cfg,
        cfg.optimizer,
        samples * batch.rows_per_sample,
        context,
        half=setup.dtype != "float32",
        recompute=cfg.recompute,
        shards=setup.ranks_of_model,
        device=world.device,
        attention=cfg.attention,
        accumulates=samples < -(-len(batch) // world.size),
    )
    return (
        f"parameters: {'; '.join(groups)}\n"
        f"ahead: {steps:,} steps of {step_tokens:,} tokens on {world.device}, "
        f"about {duration(work / speed)}, peak memory about {memory / 1e9:.2f} GB"
    )


# ---- the batch


PLAIN = ("⟦", "⟧")
GREEN = ("\x1b[32m", "\x1b[39m")  # what terminals take for "green from here" and "as before"


def legend(marks: tuple[str, str] = PLAIN) -> str:
    """What the marks of `show_batch` mean."""
    begin, end = marks
    return f"┃ begins a document, {begin}this{end} is learned, the rest is only read"


def show_batch(
    batch: Batch, tok: Tokenizer, documents: int = 12, marks: tuple[str, str] = PLAIN
) -> str:
    """The first documents of a batch as text: `┃` begins one, the marks enclose what is learned."""
    ids = batch.ids.flatten().tolist()
    targets = batch.targets.flatten().tolist()
    segments = list(pairwise(batch.cu_seqlens.tolist()))
    shown = []
    for number, (begin, end) in enumerate(segments):
        learned = [target != IGNORE for target in targets[begin:end]]
        if not any(learned):
            continue  # padding
        tokens = ids[begin:end]
        if batch.branches is not None:  # the prompt that this answer continues
            prompt = ids[slice(*segments[int(batch.branches.continues[number])])]
            tokens = prompt + tokens
            learned = [False] * len(prompt) + learned
        if learned[-1]:
            tokens.append(targets[end - 1])  # the last target is no input
        # Nothing predicts the first token. It is marked as the second: both may be of one
        # character.
        learned.insert(0, learned[0])
        text = "┃"
        marked = zip(tokens, learned, strict=False)
        for is_learned, group in groupby(marked, key=lambda pair: pair[1]):
            piece = tok.decode([token for token, _ in group])
            text += marks[0] + piece + marks[1] if is_learned else piece
        shown.append(text)
        if len(shown) == documents:
            break
    return "\n\n".join(shown)
