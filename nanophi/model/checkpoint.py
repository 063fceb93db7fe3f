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

from nanophi.cli import SHOWN, UserError
from nanophi.expect import Expected, check, check_fields, path_of, read_json, shown
from nanophi.files import finish, replacing, together, write_json
from nanophi.model.config import PHI, PhiConfig
from nanophi.model.phi import DECODING_WEIGHTS, MASKED_BIAS, Phi
from nanophi.tokenizer.template import template_named
from nanophi.tokenizer.tokenizer import Tokenizer

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"  # transformers splits large models


# ---- save


def save(
    directory: str | Path,
    model: Phi,
    tok: Tokenizer | None = None,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write a model, and the tokenizer where given, as AutoModelForCausalLM and AutoTokenizer read
    them.

    weights: in place of the model's own state_dict(), whose tensors may be distributed over ranks.
    """
    check_architecture(model)
    directory = path_of(directory, "the directory of a model")
    cfg = model.cfg
    ids = {
        "bos_token_id": cfg.bos_token_id,
        "eos_token_id": cfg.eos_token_id,  # without it, transformers' generate would never stop
        "pad_token_id": cfg.pad_token_id,
    }
    if weights is None:
        weights = model.state_dict()
    state = {name: tensor.detach().float().contiguous().cpu() for name, tensor in weights.items()}
    with together(directory) as files:
        write_json(directory / "config.json", cfg.to_dict(model.architecture))
        write_json(directory / "generation_config.json", ids)
        if tok is not None:
            tok.save(directory)
        with replacing(directory / WEIGHTS) as beside:
            try:
                save_file(state, beside, metadata={"format": "pt", "crc32": NO_CHECKSUM})
            except SafetensorError as error:  # such as a full disk
                raise UserError(f"cannot write {directory / WEIGHTS}: {error}") from None
            add_checksum(beside)
        if (directory / WEIGHTS_INDEX).exists():
            # The index of a split model that stood here would be read first.
            files.delete(directory / WEIGHTS_INDEX)


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
    expected = torch.tensor(PROBE_LOGITS)
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
        wave = (torch.arange(p.numel()) * 0.7 + number).sin() * 0.5
        p.copy_(wave.view(p.shape))
    ids = torch.arange(48)[None] % 7
    with torch.autocast("cpu", enabled=False):
        return model(ids)[0, -1]


# ---- the checksum of model.safetensors

CHECKSUM_MARK = "crc32:"
NO_CHECKSUM = CHECKSUM_MARK + "00000000"
BLOCK = 2**24  # bytes that are read at once


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


def load(
    directory: str | Path,
    device: str = "cpu",
    network: type[Phi] = Phi,
    weights: str = "fp32",
) -> tuple[Phi, Tokenizer | None]:
    """Read any PhiForCausalLM directory with safetensors -> (model, tokenizer or None).

    The model is in fp32 and in eval mode.

    device:  as `pick_device` takes it, for example "auto"
    network: the class that computes it; a changed one reads what it has saved
    weights: how `generate` keeps them, one of phi.DECODING_WEIGHTS. "fp16" decodes several times as
             fast on a CPU, and changes the logits in the fourth digit

    Raises a UserError that names the file if the directory holds no model, or another one than
    config.json says.
    """
    device = pick_device(device)
    check(weights, Expected(str, choices=DECODING_WEIGHTS), "weights")
    directory = path_of(directory, "the directory of a model")
    finish(directory)  # what a killed `save` has left
    cfg = _read_config(directory, network.architecture)
    files = _weight_files(directory)
    shapes = _read_shapes(files)
    if cfg.num_hidden_layers > len(shapes):  # building layers takes time
        raise UserError(
            f"{files[0]} does not fit its config.json: {len(shapes):,} tensors are too few for "
            f"{cfg.num_hidden_layers:,} layers"
        )
    with torch.device("meta"):  # only shapes: the weights come from the file
        model = network(cfg)
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    _check_shapes(expected, shapes, directory / WEIGHTS)
    model.load_state_dict(_read_weights(files), assign=True)
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
) -> tuple[Phi, Tokenizer]:
    """`load`, for callers that need the tokenizer too.

    template: the name of a chat template to use in place of the one that the tokenizer has

    Raises a UserError if there is none or if it does not fit the model.
    """
    model, tok = load(directory, device, weights=weights)
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


def _read_config(directory: Path, architecture: str) -> PhiConfig:
    path = directory / "config.json"
    if not path.exists():
        raise UserError(
            f"no model in {directory}: config.json is missing; pretrain.py, sft.py and dpo.py "
            "write one"
        )
    return PhiConfig.from_dict(read_json(path), architecture, str(path))


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
FLOATS = ("F64", "F32", "F16", "BF16")


def _read_shapes(files: list[Path]) -> dict[str, list[int]]:
    """The shapes of all tensors, by the headers of the files, whose checksums are looked at."""
    shapes: dict[str, list[int]] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                types = {name: tensor.get_dtype() for name, tensor in slices.items()}
                here = {name: tensor.get_shape() for name, tensor in slices.items()}
        except SafetensorError as error:
            raise UserError(f"{path} is damaged: {str(error)[:200]}") from None
        check_checksum(path, metadata)
        for name, dtype in types.items():
            if dtype not in FLOATS:
                raise UserError(
                    f"{path}: {name[:SHOWN]} is of type {dtype}, expected one of "
                    f"{', '.join(FLOATS)}; convert the weights to float32 first"
                )
            if name in shapes:
                raise UserError(f"{path}: {name[:SHOWN]} is in another file of the model too")
        shapes |= here
    return shapes


def _check_shapes(expected: dict[str, list[int]], found: dict[str, list[int]], path: Path) -> None:
    """Refuse weights that do not fit: missing, of another shape, or of no layer."""
    faults = [f"{name} is missing" for name in expected if name not in found]
    for name, shape in expected.items():
        if name in found and found[name] != shape:
            faults.append(f"{name} has the shape {found[name]}, not {shape}")
    faults += [f"{name[:SHOWN]} is not of this model" for name in found if name not in expected]
    if faults:
        listed = "; ".join(faults[:6])
        if len(faults) > 6:
            listed += f"; and {len(faults) - 6} more"
        raise UserError(f"{path} does not fit its config.json: {listed}")


def _read_weights(files: list[Path]) -> dict[str, Tensor]:
    """All tensors in fp32. A UserError names those with numbers that are not finite."""
    weights: dict[str, Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            here = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        for name, tensor in here.items():
            wrong = tensor.numel() - int(tensor.isfinite().sum())
            if wrong:
                raise UserError(
                    f"{path}: {wrong:,} of {tensor.numel():,} numbers of {name} are not finite: "
                    "the training has diverged, or the file is damaged; take an earlier checkpoint"
                )
        weights |= here
    return weights
