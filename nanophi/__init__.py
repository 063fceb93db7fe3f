"""nanophi: Phi2-mini-Chinese from scratch. Raw Chinese text -> token ids -> model -> weights ->
text.

    model, tok = nanophi.load("out/demo/dpo")
    ids = nanophi.generate(model, nanophi.chat_prompt("你是谁？", tok))

The public names are imported on first use (PEP 562): `import nanophi` alone loads neither torch nor
opencc. Every submodule can be reached too, as `nanophi.train.losses`.
"""

from typing import TYPE_CHECKING

from nanophi.cli import UserError
from nanophi.lazy import on_first_use

if TYPE_CHECKING:  # for editors and type checkers, which do not run __getattr__
    from nanophi.infer.beams import beam_search
    from nanophi.infer.engine import Engine, Request
    from nanophi.infer.generate import generate, stream
    from nanophi.model.checkpoint import load, save
    from nanophi.model.config import PhiConfig, presets
    from nanophi.model.phi import KVCache, Phi, Record
    from nanophi.text.clean import clean
    from nanophi.tokenizer.bpe import train_bpe
    from nanophi.tokenizer.chat import chat_prompt, encode_chat
    from nanophi.tokenizer.tokenizer import Tokenizer
    from nanophi.train.config import TrainConfig
    from nanophi.train.losses import answer_logps, dpo_loss, next_token_loss
    from nanophi.train.optim import build_optimizers, schedule
    from nanophi.train.packing import Batch, Packed
    from nanophi.train.preferences import Pairs, Preference

__version__ = "0.1.0"

_MODULE_OF = {
    # text -> ids
    "clean": "nanophi.text.clean",
    "Tokenizer": "nanophi.tokenizer.tokenizer",
    "train_bpe": "nanophi.tokenizer.bpe",
    "encode_chat": "nanophi.tokenizer.chat",
    "chat_prompt": "nanophi.tokenizer.chat",
    # ids -> logits
    "PhiConfig": "nanophi.model.config",
    "presets": "nanophi.model.config",
    "Phi": "nanophi.model.phi",
    "KVCache": "nanophi.model.phi",
    "Record": "nanophi.model.phi",
    "load": "nanophi.model.checkpoint",
    "save": "nanophi.model.checkpoint",
    # logits -> weights
    "Packed": "nanophi.train.packing",
    "Batch": "nanophi.train.packing",
    "Pairs": "nanophi.train.preferences",
    "Preference": "nanophi.train.preferences",
    "next_token_loss": "nanophi.train.losses",
    "answer_logps": "nanophi.train.losses",
    "dpo_loss": "nanophi.train.losses",
    "build_optimizers": "nanophi.train.optim",
    "schedule": "nanophi.train.optim",
    "TrainConfig": "nanophi.train.config",
    # weights -> text
    "generate": "nanophi.infer.generate",
    "stream": "nanophi.infer.generate",
    "beam_search": "nanophi.infer.beams",
    "Engine": "nanophi.infer.engine",
    "Request": "nanophi.infer.engine",
}

__all__ = ["UserError", "__version__", *_MODULE_OF]

if not TYPE_CHECKING:
    __getattr__ = on_first_use(__name__, _MODULE_OF)


def __dir__() -> list[str]:
    return sorted(__all__)
