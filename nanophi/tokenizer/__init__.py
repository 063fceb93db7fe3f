"""Strings -> token ids and back. Imports nothing of ours but the ground: cli, expect, files and
parallel.
"""

from typing import TYPE_CHECKING

from nanophi.lazy import on_first_use

if not TYPE_CHECKING:  # `nanophi.train.losses` works without an import of its own
    __getattr__ = on_first_use(__name__)
