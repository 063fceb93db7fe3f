"""Documents: reading, cleaning, deduplication, statistics, and token ids on disk."""

from typing import TYPE_CHECKING

from nanophi.lazy import on_first_use

if not TYPE_CHECKING:  # `nanophi.train.losses` works without an import of its own
    __getattr__ = on_first_use(__name__)
