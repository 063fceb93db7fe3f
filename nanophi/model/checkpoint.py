"""The checkpoint directory: one self-contained folder that nanophi, transformers and other engines load as it is.

    config.json  generation_config.json  model.safetensors                      the model
    tokenizer.json  tokenizer_config.json  special_tokens_map.json              the tokenizer, chat template inside

The training loop adds run.json, metrics.jsonl and train_state.pt; deleting the last ships the model. Every file is
written beside its name and renamed.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nanophi.cli import UserError
from nanophi.files import replacing, write_json
from nanophi.model.config import PhiConfig
from nanophi.model.phi import Phi
from nanophi.tokenizer.tokenizer import Tokenizer

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"  # transformers splits large models


def save(
    directory: str | Path, model: Phi, tok: Tokenizer | None = None, weights: dict | None = None
) -> None:
    """Write a model, and the tokenizer where given, as AutoModelForCausalLM and AutoTokenizer read them.

    weights: in place of the model's own state_dict(), which may be sharded."""
    directory = Path(directory)
    cfg = model.cfg
    write_json(directory / "config.json", cfg.to_dict())
    # Without eos_token_id here, transformers' generate would never stop.
    ids = {
        "bos_token_id": cfg.bos_token_id,
        "eos_token_id": cfg.eos_token_id,
        "pad_token_id": cfg.pad_token_id,
    }
    write_json(directory / "generation_config.json", ids)
    if tok is not None:
        tok.save(directory)
    weights = model.state_dict() if weights is None else weights
    state = {name: tensor.detach().float().contiguous().cpu() for name, tensor in weights.items()}
    with replacing(directory / WEIGHTS) as beside:
        try:
            save_file(
                state, beside, metadata={"format": "pt"}
            )  # one key: several come in a different order each time
        except SafetensorError as error:  # a full disk, for one
            raise UserError(f"cannot write {directory / WEIGHTS}: {error}") from None
    (directory / WEIGHTS_INDEX).unlink(
        missing_ok=True
    )  # of a split model that stood here: it would be read first


def pick_device(name: str) -> str:
    """ "auto" -> "cuda" where there is one, else "cpu"; another name is tried, and refused where there is no such."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here: {error}") from None
    return name


def load(directory: str | Path, device: str = "cpu") -> tuple[Phi, Tokenizer | None]:
    """Read any PhiForCausalLM directory with safetensors -> (model in fp32 and eval mode, tokenizer or None).

    device: as `pick_device` takes it, "auto" among others.
    """
    directory = Path(directory)
    if not (directory / "config.json").exists():
        raise UserError(
            f"no model in {directory}: config.json is missing; pretrain.py, sft.py and dpo.py write one"
        )
    try:
        cfg = PhiConfig.from_dict(
            json.loads((directory / "config.json").read_text(encoding="utf-8"))
        )
    except json.JSONDecodeError as error:
        raise UserError(f"{directory / 'config.json'} is no JSON: {error}") from None
    with torch.device(
        "meta"
    ):  # shapes only: the weights come from the file, there is nothing to initialise
        model = Phi(cfg)
    weights = _read_weights(directory)
    if faults := _differences(model.state_dict(), weights):
        shown = "; ".join(faults[:6]) + (f"; and {len(faults) - 6} more" if len(faults) > 6 else "")
        raise UserError(f"{directory / WEIGHTS} does not fit its config.json: {shown}")
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
    tok = Tokenizer.load(directory) if (directory / "tokenizer.json").exists() else None
    return model.to(pick_device(device)).requires_grad_().eval(), tok


def load_with_tokenizer(directory: str | Path, device: str = "cpu") -> tuple[Phi, Tokenizer]:
    """`load`, for those who cannot go on without a tokenizer."""
    model, tok = load(directory, device)
    if tok is None:
        raise UserError(
            f"{directory} holds no tokenizer.json; the tokenizer travels inside a checkpoint directory"
        )
    if len(tok) > model.cfg.vocab_size:
        raise UserError(
            f"{directory}: tokenizer.json has {len(tok):,} tokens, the model of config.json knows "
            f"{model.cfg.vocab_size:,}; they do not belong together"
        )
    return model, tok


def _differences(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> list[str]:
    """What is missing, misshapen or too many in a state dict, by name."""
    shapes = [
        {name: list(tensor.shape) for name, tensor in state.items()} for state in (expected, found)
    ]
    want, have = shapes
    return [
        *(f"{name} is missing" for name in want if name not in have),
        *(
            f"{name} has the shape {have[name]}, not {want[name]}"
            for name in want
            if have.get(name, want[name]) != want[name]
        ),
        *(f"{name} is not of this model" for name in have if name not in want),
    ]


def _read_weights(directory: Path) -> dict[str, torch.Tensor]:
    index = directory / WEIGHTS_INDEX
    names = [WEIGHTS]
    if index.exists():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    state: dict[str, torch.Tensor] = {}
    for name in names:
        if not (directory / name).exists():
            pickled = [path.name for path in directory.glob("*.bin")] + [
                path.name for path in directory.glob("*.pt")
            ]
            aside = f" ({', '.join(pickled)} may run code when loaded)" if pickled else ""
            raise UserError(
                f"{directory / name} is missing; only safetensors weights are read{aside}"
            )
        try:
            state |= load_file(directory / name)
        except SafetensorError as error:
            raise UserError(f"{directory / name} is damaged: {error}") from None
    return state
