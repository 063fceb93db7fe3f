"""The checkpoint directory: one folder that nanophi, transformers and other engines load as it is.

    the model        config.json  generation_config.json  model.safetensors
    the tokenizer    tokenizer.json  tokenizer_config.json (with the chat template)
                     special_tokens_map.json

Training adds run.json, metrics.jsonl and train_state.pt. To ship a model, delete train_state.pt.
All files appear together, when the last one is written. model.safetensors carries a checksum of
itself, so that a bit that has flipped on a disk or on the way is found when it is loaded.

Read in this order: `save`, the checksum, `load`.
"""

import json
import os
import zlib
from pathlib import Path
from typing import IO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nanophi.cli import SHOWN, UserError, row_named
from nanophi.expect import Expected, check, check_fields, path_of, read_json, shown
from nanophi.files import finish, replacing, together, write_json
from nanophi.model import older
from nanophi.model.backends import has_bf16
from nanophi.model.config import PHI, PhiConfig
from nanophi.model.phi import DECODING_WEIGHTS, MASKED_BIAS, Phi
from nanophi.tokenizer.template import template_named
from nanophi.tokenizer.tokenizer import Tokenizer

WEIGHTS = "model.safetensors"
# A large model is split: model-00001-of-00003.safetensors and so on, and an index says where each
# tensor is.
WEIGHTS_INDEX = "model.safetensors.index.json"
PARTS = "model-*-of-*.safetensors"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# ---- save


def save(
    directory: str | Path,
    model: Phi,
    tok: Tokenizer | None = None,
    weights: dict[str, Tensor] | None = None,
    dtype: str = "float32",
    max_shard_bytes: int | None = None,
) -> None:
    """Write a model, and the tokenizer where given, as AutoModelForCausalLM and AutoTokenizer read
    them.

    weights: in place of the model's own state_dict(), whose tensors may be distributed over ranks
    dtype:   a name of DTYPES
    max_shard_bytes: split the weights into files of at most so many bytes; a tensor stays whole
    """
    check_architecture(model)
    kind = row_named(DTYPES, dtype, "dtype")
    check(max_shard_bytes, Expected(int, at_least=1, optional=True), "max_shard_bytes")
    directory = path_of(directory, "the directory of a model")
    cfg = model.cfg
    ids = {
        "bos_token_id": cfg.bos_token_id,
        "eos_token_id": cfg.eos_token_id,  # without it, transformers' generate would never stop
        "pad_token_id": cfg.pad_token_id,
    }
    if weights is None:
        weights = model.state_dict()
    weights = {name: tensor.detach() for name, tensor in weights.items()}
    shards = shards_of(weights, kind.itemsize, max_shard_bytes)
    with together(directory) as files:
        write_json(directory / "config.json", cfg.to_dict(model.architecture, dtype))
        write_json(directory / "generation_config.json", ids)
        if tok is not None:
            tok.save(directory)
        for name, own in shards.items():
            _write_weights(directory / name, {key: weights[key] for key in own}, kind)
        if len(shards) > 1:
            places = {key: name for name, own in shards.items() for key in own}
            size = sum(tensor.numel() for tensor in weights.values()) * kind.itemsize
            index = {"metadata": {"total_size": size}, "weight_map": places}
            write_json(directory / WEIGHTS_INDEX, index)
        # An index of a split model that stood here would be read first.
        written = {*shards, WEIGHTS_INDEX} if len(shards) > 1 else {WEIGHTS}
        for old in (directory / WEIGHTS, directory / WEIGHTS_INDEX, *directory.glob(PARTS)):
            if old.name not in written and old.exists():
                files.delete(old)


def shards_of(weights: dict[str, Tensor], itemsize: int, limit: int | None) -> dict[str, list[str]]:
    """The files of a model: {name of the file: names of its tensors}.

    >>> weights = {"a": torch.zeros(6), "b": torch.zeros(3), "c": torch.zeros(3)}
    >>> shards_of(weights, itemsize=4, limit=None)
    {'model.safetensors': ['a', 'b', 'c']}
    >>> shards_of(weights, itemsize=4, limit=24)
    {'model-00001-of-00002.safetensors': ['a'], 'model-00002-of-00002.safetensors': ['b', 'c']}
    """
    shards: list[list[str]] = []
    room = 0
    for name, tensor in weights.items():
        size = tensor.numel() * itemsize
        if not shards or (limit is not None and size > room):
            shards.append([])
            room = limit or 0
        shards[-1].append(name)
        room -= size
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    count = len(shards)
    return {
        f"model-{number:05}-of-{count:05}.safetensors": own for number, own in enumerate(shards, 1)
    }


def _write_weights(path: Path, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
    state = {name: tensor.to(dtype).contiguous().cpu() for name, tensor in weights.items()}
    for name, tensor in weights.items():
        if tensor.isfinite().all() and not state[name].isfinite().all():
            kind = str(dtype).removeprefix("torch.")
            raise UserError(f"{name} has numbers that {kind} cannot hold: take another dtype")
    with replacing(path) as beside:
        try:
            save_file(state, beside, metadata={"format": "pt", "crc32": NO_CHECKSUM})
        except SafetensorError as error:  # such as a full disk
            raise UserError(f"cannot write {path}: {error}") from None
        add_checksum(beside)


# A tiny network that uses all of Phi: grouped queries, several rotary frequencies, far positions.
PROBE = PhiConfig(
    vocab_size=8,
    hidden_size=64,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rope_theta=100.0,
)
# What transformers' PhiForCausalLM answers to `_probe`. A test asks it again.
PROBE_LOGITS = (-3.32880, 3.15885, 7.70161, 7.45517, 2.56544, -3.91905, -7.95431, -7.03140)


def check_architecture(model: Phi) -> None:
    """Refuse a network that calls itself PhiForCausalLM and computes something else.

    Somebody who changes a block (SwiGLU, RMSNorm, ALiBi) learns here, and not from the nonsense of
    another engine, that the network needs a name of its own. A tiny network of the same class, with
    fixed weights, answers a fixed input by two backends.
    """
    if model.architecture != PHI:
        return
    expected = torch.tensor(PROBE_LOGITS, dtype=torch.float32)
    problem = None
    try:
        same = all(
            torch.allclose(_probe(type(model), backend), expected, atol=1e-4)
            for backend in ("manual", "sdpa")
        )
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        problem = error
        same = False
    if not same:
        raise UserError(
            f"this network does not compute what {PHI} computes, so config.json may not say so: "
            "other engines would load its weights and answer nonsense. Give it a name of its own, "
            "such as `architecture = 'MyPhi'`, in the class Phi of nanophi/model/phi.py"
        ) from problem


@torch.no_grad()
def _probe(network: type[Phi], backend: str) -> Tensor:
    """The logits (V,) of the last of 48 tokens, by a tiny network whose weights are sines."""
    with torch.device("meta"):  # draws no random numbers, so a run goes on as without the check
        model = network(PROBE, attention=backend)
    model = model.to_empty(device="cpu").float().eval()
    for number, (_, p) in enumerate(sorted(model.named_parameters())):
        steps = torch.arange(p.numel(), dtype=torch.float32)
        wave = (steps * 0.7 + number).sin() * 0.5
        p.copy_(wave.view(p.shape))
    ids = torch.arange(48)[None] % 7
    with torch.autocast("cpu", enabled=False):
        return model(ids)[0, -1]


# ---- the checksum of model.safetensors

CHECKSUM_MARK = "crc32:"
NO_CHECKSUM = CHECKSUM_MARK + "00000000"
BLOCK = 2**20  # bytes that are read at once


def add_checksum(path: Path) -> None:
    """Put the checksum of a file that save_file has written into its metadata.

        8 bytes   the length of the header
        header    {"__metadata__": {"crc32": "crc32:1a2b3c4d", "format": "pt"}, name: place, ...}
        data      the numbers of all tensors, at the places that the header says

    The checksum is that of the whole file, in which its own eight digits are zeros. Other programs
    read the file as before; those that write it anew leave the checksum out.
    """
    with open(path, "rb+") as file:
        length = file.read(8)
        header = file.read(int.from_bytes(length, "little"))
        entries = json.loads(header)
        # The library writes several entries of metadata in a random order.
        entries["__metadata__"] = dict(sorted(entries["__metadata__"].items()))
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False)
        ordered = text.encode().ljust(len(header))
        assert len(ordered) == len(header)
        found = checksum(length + ordered, file)
        file.seek(8)
        file.write(ordered.replace(NO_CHECKSUM.encode(), found.encode(), 1))


def checksum(beginning: bytes, file: IO[bytes]) -> str:
    """The CRC-32 of some bytes and of the rest of a file, with the mark in front.

    >>> import io
    >>> checksum(b"1234", io.BytesIO(b"56789"))
    'crc32:cbf43926'
    """
    crc = zlib.crc32(beginning)
    while block := file.read(BLOCK):
        crc = zlib.crc32(block, crc)
    return f"{CHECKSUM_MARK}{crc:08x}"


def check_checksum(path: Path, metadata: dict[str, str]) -> None:
    """A UserError where a file is not as it was written. Files without a checksum pass.

    The checksum is known by its name and by its mark, so one flipped bit cannot hide it.
    """
    stored = [
        value
        for name, value in metadata.items()
        if name == "crc32" or value.startswith(CHECKSUM_MARK)
    ]
    if not stored:
        return
    with open(path, "rb") as file:
        length = file.read(8)
        header = file.read(int.from_bytes(length, "little"))
        header = header.replace(stored[0].encode(), NO_CHECKSUM.encode(), 1)
        found = checksum(length + header, file)
    if found != stored[0]:
        raise UserError(
            f"{path} is damaged: its checksum is {found}, and {stored[0][:SHOWN]} when it was "
            "written; copy it again, or train the model again"
        )


# ---- load


def pick_device(name: str) -> str:
    """The device that a name stands for: "auto" is "cuda" where there is one, otherwise "cpu".

    Raises a UserError if the device cannot be used here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()  # "meta" has tensors, but no numbers in them
    except (RuntimeError, AssertionError, ImportError, TypeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        line = f"--device {str(name)[:SHOWN]} cannot be used here: {reason}"
        raise UserError(line if len(line) <= 190 else line[:189] + "…") from None
    return name


def pick_dtype(device: str) -> str:
    """The dtype of weights that are only read: bfloat16 on a GPU that computes in it, otherwise
    float32. A GPU decodes as fast as it reads them, and in bfloat16 they are half as long.
    """
    return "bfloat16" if has_bf16(device) else "float32"


def load(
    directory: str | Path,
    device: str = "cpu",
    network: type[Phi] = Phi,
    weights: str = "fp32",
    dtype: str | None = "float32",
) -> tuple[Phi, Tokenizer | None]:
    """Read any PhiForCausalLM directory with safetensors -> (model, tokenizer or None).

    The model is in eval mode. Where its dtype is that of the files, the weights lie in their
    memory map and take no other memory.

    dtype:   a name of DTYPES; None for that of the files; "auto" for that of `pick_dtype`
    device:  as `pick_device` takes it, for example "auto"
    network: the class that computes it; a changed one reads what it has saved
    weights: how `generate` keeps them, one of phi.DECODING_WEIGHTS. "fp16" decodes several times as
             fast on a CPU, and changes the logits in the fourth digit

    Raises a UserError that names the file if the directory holds no model, or another one than
    config.json says.
    """
    device = pick_device(device)
    check(weights, Expected(str, choices=DECODING_WEIGHTS), "weights")
    if dtype == "auto":
        dtype = pick_dtype(device)
    if dtype is not None:
        row_named(DTYPES, dtype, "dtype")
    directory = path_of(directory, "the directory of a model")
    finish(directory)  # what a killed `save` has left
    cfg, is_older = _read_config(directory, network.architecture)
    files = _weight_files(directory)
    found = _read_headers(files)
    if cfg.num_hidden_layers > len(found):  # building layers takes time
        raise UserError(
            f"{files[0]} does not fit its config.json: {len(found):,} tensors are too few for "
            f"{cfg.num_hidden_layers:,} layers"
        )
    with torch.device("meta"):  # only shapes: the weights come from the file
        model = network(cfg)
    if is_older:
        found = older.weights_of(found, cfg)
    _check_shapes(model.state_dict(), found, directory / WEIGHTS)
    stored = found["lm_head.weight"].dtype
    tensors = _read_weights(files, stored if dtype is None else DTYPES[dtype])
    if is_older:
        tensors = older.weights_of(tensors, cfg)
    model.load_state_dict(tensors, assign=True)
    tok = None
    if (directory / "tokenizer.json").exists():
        tok = Tokenizer.load(directory)
    model.to(device)
    model.decoding_weights = weights
    return model.requires_grad_().eval(), tok


def load_with_tokenizer(
    directory: str | Path,
    device: str = "cpu",
    template: str | None = None,
    weights: str = "fp32",
    dtype: str | None = "float32",
) -> tuple[Phi, Tokenizer]:
    """`load`, for callers that need the tokenizer too.

    template: the name of a chat template to use in place of the one that the tokenizer has

    Raises a UserError if there is none or if it does not fit the model.
    """
    model, tok = load(directory, device, weights=weights, dtype=dtype)
    if tok is None:
        raise UserError(
            f"{directory} holds no tokenizer.json; the tokenizer travels inside a checkpoint "
            "directory"
        )
    if len(tok) > model.cfg.vocab_size:
        raise UserError(
            f"{directory}: tokenizer.json has {len(tok):,} tokens, the model of config.json knows "
            f"{model.cfg.vocab_size:,}; they do not belong together"
        )
    used = rows_in_use(model)
    if used < model.cfg.vocab_size and used != len(tok):
        raise UserError(
            f"{directory}: tokenizer.json has {len(tok):,} tokens, the model uses {used:,}; they "
            "do not belong together (after tok.add_tokens, call model.set_vocabulary(len(tok)))"
        )
    if template is not None:
        use_template(model, tok, template)
    return model, tok


def use_template(model: Phi, tok: Tokenizer, name: str) -> None:
    """Give model and tokenizer a chat template: its special tokens get ids, and its stop token ends
    answers.
    """
    template = template_named(name)
    tok.add_tokens(list(template.specials), special=True)
    if len(tok) > model.cfg.vocab_size:
        raise UserError(
            f"--template {name} needs {len(tok):,} tokens, the model has {model.cfg.vocab_size:,}: "
            f"train_tokenizer.py --special-tokens {' '.join(template.specials)} makes room before "
            "pretraining"
        )
    model.set_vocabulary(len(tok))
    model.cfg.eos_token_id = tok.special_id(template.stop)
    tok.template = name


def rows_in_use(model: Phi) -> int:
    """The rows of lm_head up to those at the end that `set_vocabulary` has made impossible.

    In models from elsewhere these are often all rows, also where the tokenizer has fewer tokens.
    """
    possible = model.lm_head.bias > MASKED_BIAS / 2
    return int(possible.nonzero().max()) + 1 if possible.any() else 0


def _read_config(directory: Path, architecture: str) -> tuple[PhiConfig, bool]:
    """The shape of a model, and whether its names are those of older.py."""
    path = directory / "config.json"
    if not path.exists():
        raise UserError(
            f"no model in {directory}: config.json is missing; pretrain.py, sft.py and dpo.py "
            "write one"
        )
    config = read_json(path)
    is_older = isinstance(config, dict) and config.get("model_type") == older.MODEL_TYPE
    if is_older:
        config = older.config_of(config, str(path))
    return PhiConfig.from_dict(config, architecture, str(path)), is_older


def _weight_files(directory: Path) -> list[Path]:
    """model.safetensors, or the files of the directory that an index names."""
    index = directory / WEIGHTS_INDEX
    if not index.exists():
        if (directory / WEIGHTS).is_file():
            return [directory / WEIGHTS]
        pickled = [*directory.glob("*.bin"), *directory.glob("*.pt")]
        warning = ""
        if pickled:
            listed = ", ".join(path.name for path in pickled)
            warning = f" ({listed} may run code when loaded)"
        raise UserError(
            f"{directory / WEIGHTS} is missing; only safetensors weights are read{warning}"
        )
    fix = "copy the index and all files of the model again"
    fields = read_json(index, fix)
    check_fields(fields, {"weight_map": Expected(dict)}, index, fix)
    weight_map = fields["weight_map"]
    check_fields(weight_map, dict.fromkeys(weight_map, Expected(str)), f"{index}: weight_map", fix)
    names = sorted(set(weight_map.values()))
    if not names:
        raise UserError(f"{index}: weight_map names no file; {fix}")
    # What is in the listing is a plain name: no path, no "..", nothing outside of the directory.
    present = os.listdir(directory)
    for name in names:
        if name not in present or not (directory / name).is_file():
            raise UserError(
                f"{index}: weight_map names {shown(name)}, which is no file in {directory}; {fix}"
            )
    return [directory / name for name in names]


# The types of weights, as safetensors names them. Others hold no plain numbers: float8 weights
# need scales that lie elsewhere.
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def _read_headers(files: list[Path]) -> dict[str, Tensor]:
    """All tensors without their numbers, by the headers of the files; their checksums are looked
    at.
    """
    found: dict[str, Tensor] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                types = {name: tensor.get_dtype() for name, tensor in slices.items()}
                shapes = {name: tensor.get_shape() for name, tensor in slices.items()}
        except SafetensorError as error:
            raise UserError(f"{path} is damaged: {str(error)[:200]}") from None
        check_checksum(path, metadata)
        for name, dtype in types.items():
            if dtype not in FLOATS:
                raise UserError(
                    f"{path}: {name[:SHOWN]} is of type {dtype}, expected one of "
                    f"{', '.join(FLOATS)}; convert the weights to float32 first"
                )
            if name in found:
                raise UserError(f"{path}: {name[:SHOWN]} is in another file of the model too")
            found[name] = torch.empty(shapes[name], dtype=FLOATS[dtype], device="meta")
    return found


def _check_shapes(expected: dict[str, Tensor], found: dict[str, Tensor], path: Path) -> None:
    """Refuse weights that do not fit: missing, of another shape, or of no layer."""
    faults = [f"{name} is missing" for name in expected if name not in found]
    for name, tensor in expected.items():
        if name in found and found[name].shape != tensor.shape:
            shapes = list(found[name].shape), list(tensor.shape)
            faults.append(f"{name} has the shape {shapes[0]}, not {shapes[1]}")
    faults += [f"{name[:SHOWN]} is not of this model" for name in found if name not in expected]
    if faults:
        listed = "; ".join(faults[:6])
        if len(faults) > 6:
            listed += f"; and {len(faults) - 6} more"
        raise UserError(f"{path} does not fit its config.json: {listed}")


def _read_weights(files: list[Path], dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors. A UserError names those with numbers that are not finite."""
    weights: dict[str, Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            here = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        for name, tensor in here.items():
            tensor = here[name] = tensor.to(dtype)
            parts = tensor.flatten().split(2**20)  # so that what is computed takes little memory
            wrong = tensor.numel() - sum(int(part.isfinite().sum()) for part in parts)
            if wrong:
                raise UserError(
                    f"{path}: {wrong:,} of {tensor.numel():,} numbers of {name} are not finite: "
                    "the training has diverged, or the file is damaged; take an earlier checkpoint"
                )
        weights |= here
    return weights
