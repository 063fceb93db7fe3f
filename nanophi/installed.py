"""The five scripts as commands, where the package is installed from a wheel: nanophi-pretrain ...

In the repository the scripts lie beside the package, where one reads and changes them. A wheel
carries copies in nanophi/scripts (setup.py makes them), since top-level modules called `generate`
or `sft` would be in the way of other packages.

Several processes: torchrun --nproc-per-node 2 $(which nanophi-pretrain) ...
"""

import runpy
from pathlib import Path

PACKAGE = Path(__file__).parent


def run(name: str) -> None:
    """Run a script as `python name.py` would."""
    places = (PACKAGE / "scripts" / f"{name}.py", PACKAGE.parent / f"{name}.py")
    path = next(path for path in places if path.is_file())
    runpy.run_path(str(path), run_name="__main__")


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
