"""nanophi: Phi2-mini-Chinese from scratch. Raw Chinese text -> token ids -> model -> weights -> text.

The public names below are imported on first use (PEP 562): `import nanophi` alone loads neither torch nor opencc.
"""

import importlib

__version__ = "0.1.0"

_WHERE = {
    "clean": "nanophi.text.clean",
    "Tokenizer": "nanophi.tokenizer.tokenizer",
    "train_bpe": "nanophi.tokenizer.bpe",
    "chat_prompt": "nanophi.tokenizer.chat",
    "PhiConfig": "nanophi.model.config",
    "Phi": "nanophi.model.phi",
    "load": "nanophi.model.checkpoint",
    "save": "nanophi.model.checkpoint",
    "dpo_loss": "nanophi.train.losses",
    "generate": "nanophi.infer.generate",
    "stream": "nanophi.infer.generate",
}

__all__ = [*_WHERE, "__version__"]


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module 'nanophi' has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
