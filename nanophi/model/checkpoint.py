"""The checkpoint directory: one self-contained folder that nanophi, transformers and other engines load as it is.

    config.json  generation_config.json  model.safetensors                      the model
    tokenizer.json  tokenizer_config.json  special_tokens_map.json              the tokenizer, chat template inside

The training loop adds run.json, metrics.jsonl and train_state.pt; deleting the last ships the model. Every file is
written beside its name and renamed.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from nanophi.cli import UserError
from nanophi.files import replacing, write_json
from nanophi.model.config import PhiConfig
from nanophi.model.phi import Phi
from nanophi.text.tokenizer import Tokenizer

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"  # transformers splits large models


def save(directory: str | Path, model: Phi, tok: Tokenizer | None = None) -> None:
    """Write a model, and the tokenizer where given, as AutoModelForCausalLM and AutoTokenizer read them."""
    directory = Path(directory)
    cfg = model.cfg
    write_json(directory / "config.json", cfg.to_dict())
    # Without eos_token_id here, transformers' generate would never stop.
    ids = {"bos_token_id": cfg.bos_token_id, "eos_token_id": cfg.eos_token_id, "pad_token_id": cfg.pad_token_id}
    write_json(directory / "generation_config.json", ids)
    if tok is not None:
        tok.save(directory)
    state = {name: tensor.detach().float().contiguous().cpu() for name, tensor in model.state_dict().items()}
    with replacing(directory / WEIGHTS) as beside:
        save_file(state, beside, metadata={"format": "pt"})  # one key: several come in a different order each time


def load(directory: str | Path, device: str | torch.device = "cpu") -> tuple[Phi, Tokenizer | None]:
    """Read any PhiForCausalLM directory with safetensors -> (model in fp32 and eval mode, tokenizer or None)."""
    directory = Path(directory)
    if not (directory / "config.json").exists():
        raise UserError(f"no model in {directory}: config.json is missing; pretrain.py, sft.py and dpo.py write one")
    cfg = PhiConfig.from_dict(json.loads((directory / "config.json").read_text(encoding="utf-8")))
    with torch.device("meta"):  # shapes only: the weights come from the file, there is nothing to initialise
        model = Phi(cfg)
    try:
        model.load_state_dict({name: tensor.float() for name, tensor in _read_weights(directory).items()}, assign=True)
    except RuntimeError as error:
        raise UserError(f"{directory / WEIGHTS} does not fit its config.json: {error}") from None
    tok = Tokenizer.load(directory) if (directory / "tokenizer.json").exists() else None
    return model.to(device).requires_grad_().eval(), tok


def _read_weights(directory: Path) -> dict[str, torch.Tensor]:
    index = directory / WEIGHTS_INDEX
    names = [WEIGHTS]
    if index.exists():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    state: dict[str, torch.Tensor] = {}
    for name in names:
        if not (directory / name).exists():
            raise UserError(f"{directory / name} is missing; only safetensors weights are read")
        state |= load_file(directory / name)
    return state
