"""Token ids -> logits. Only checkpoint.py imports the tokenizer: a checkpoint holds it."""

from typing import TYPE_CHECKING

from nanophi.lazy import on_first_use

if not TYPE_CHECKING:  # `nanophi.train.losses` works without an import of its own
    __getattr__ = on_first_use(__name__)
