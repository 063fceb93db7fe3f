"""The five scripts as commands, where the package is installed from a wheel: nanophi-pretrain ...

In the repository the scripts lie beside the package, where one reads and changes them. A wheel
carries copies in nanophi/scripts (setup.py makes them), since top-level modules called `generate`
or `sft` would be in the way of other packages.

Several processes: torchrun --nproc-per-node 2 $(which nanophi-pretrain) ...
"""

import importlib.util
import sys
from pathlib import Path

from nanophi.cli import run_command

PACKAGE = Path(__file__).parent


def run(name: str) -> None:
    """Do what `python name.py` does."""
    places = (PACKAGE / "scripts" / f"{name}.py", PACKAGE.parent / f"{name}.py")
    path = next(path for path in places if path.is_file())
    spec = importlib.util.spec_from_file_location(f"nanophi.scripts.{name}", path)
    assert spec is not None
    assert spec.loader is not None
    script = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    run_command(script.Config, script.main)


def train_tokenizer() -> None:
    run("train_tokenizer")


def pretrain() -> None:
    run("pretrain")


def sft() -> None:
    run("sft")


def dpo() -> None:
    run("dpo")


def generate() -> None:
    run("generate")
