"""The checkpoint directory: one folder that nanophi, transformers and other engines load as it is.

    the model        config.json  generation_config.json  model.safetensors
    the tokenizer    tokenizer.json  tokenizer_config.json (with the chat template)
                     special_tokens_map.json

Training adds run.json, metrics.jsonl and train_state.pt. To ship a model, delete train_state.pt.
Every file is written beside its name and renamed.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanophi.cli import UserError
from nanophi.files import replacing, write_json
from nanophi.model.config import PHI, PhiConfig
from nanophi.model.phi import Phi
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
    directory = Path(directory)
    cfg = model.cfg
    write_json(directory / "config.json", cfg.to_dict(model.architecture))
    ids = {
        "bos_token_id": cfg.bos_token_id,
        "eos_token_id": cfg.eos_token_id,  # without it, transformers' generate would never stop
        "pad_token_id": cfg.pad_token_id,
    }
    write_json(directory / "generation_config.json", ids)
    if tok is not None:
        tok.save(directory)
    if weights is None:
        weights = model.state_dict()
    state = {name: tensor.detach().float().contiguous().cpu() for name, tensor in weights.items()}
    with replacing(directory / WEIGHTS) as beside:
        try:
            # Only one key of metadata: several come in a different order each time.
            save_file(state, beside, metadata={"format": "pt"})
        except SafetensorError as error:  # such as a full disk
            raise UserError(f"cannot write {directory / WEIGHTS}: {error}") from None
    # The index of a split model that stood here would be read first.
    (directory / WEIGHTS_INDEX).unlink(missing_ok=True)


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


# ---- load


def pick_device(name: str) -> str:
    """The device that a name stands for: "auto" is "cuda" where there is one, otherwise "cpu".

    Raises a UserError if the device cannot be used here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here: {error}") from None
    return name


def load(
    directory: str | Path, device: str = "cpu", network: type[Phi] = Phi
) -> tuple[Phi, Tokenizer | None]:
    """Read any PhiForCausalLM directory with safetensors -> (model, tokenizer or None).

    The model is in fp32 and in eval mode.

    device:  as `pick_device` takes it, for example "auto"
    network: the class that computes it; a changed one reads what it has saved

    Raises a UserError that names the file if the directory holds no model, or another one than
    config.json says.
    """
    directory = Path(directory)
    cfg = _read_config(directory, network.architecture)
    with torch.device("meta"):  # only shapes: the weights come from the file
        model = network(cfg)
    weights = _read_weights(directory)
    _check_weights(model.state_dict(), weights, directory / WEIGHTS)
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
    tok = None
    if (directory / "tokenizer.json").exists():
        tok = Tokenizer.load(directory)
    model.to(pick_device(device))
    return model.requires_grad_().eval(), tok


def load_with_tokenizer(directory: str | Path, device: str = "cpu") -> tuple[Phi, Tokenizer]:
    """`load`, for callers that need the tokenizer too.

    Raises a UserError if there is none or if it does not fit the model.
    """
    model, tok = load(directory, device)
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
    return model, tok


def _read_config(directory: Path, architecture: str) -> PhiConfig:
    path = directory / "config.json"
    if not path.exists():
        raise UserError(
            f"no model in {directory}: config.json is missing; pretrain.py, sft.py and dpo.py "
            "write one"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is no JSON: {error}") from None
    return PhiConfig.from_dict(config, architecture)


def _read_weights(directory: Path) -> dict[str, Tensor]:
    """The tensors of model.safetensors, or of the files that an index names."""
    names = [WEIGHTS]
    index = directory / WEIGHTS_INDEX
    if index.exists():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    weights: dict[str, Tensor] = {}
    for name in names:
        if not (directory / name).exists():
            pickled = [*directory.glob("*.bin"), *directory.glob("*.pt")]
            warning = ""
            if pickled:
                listed = ", ".join(path.name for path in pickled)
                warning = f" ({listed} may run code when loaded)"
            raise UserError(
                f"{directory / name} is missing; only safetensors weights are read{warning}"
            )
        try:
            weights |= load_file(directory / name)
        except SafetensorError as error:
            raise UserError(f"{directory / name} is damaged: {error}") from None
    return weights


def _check_weights(expected: dict[str, Tensor], weights: dict[str, Tensor], path: Path) -> None:
    """Refuse weights that do not fit: missing, of another shape, or of no layer."""
    faults = [f"{name} is missing" for name in expected if name not in weights]
    for name, tensor in expected.items():
        if name in weights and weights[name].shape != tensor.shape:
            shapes = f"{list(weights[name].shape)}, not {list(tensor.shape)}"
            faults.append(f"{name} has the shape {shapes}")
    faults += [f"{name} is not of this model" for name in weights if name not in expected]
    if faults:
        shown = "; ".join(faults[:6])
        if len(faults) > 6:
            shown += f"; and {len(faults) - 6} more"
        raise UserError(f"{path} does not fit its config.json: {shown}")
