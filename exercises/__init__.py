"""Exercises: write a part of nanophi yourself. A test fails before, and passes after.

    python -m exercises                  lists them, and says which pass
    python -m exercises 7                tests number 7: a function that is not written yet fails
    python -m exercises 7 --reference    tests the library's own function in its place

The first call for a number copies exercises/07_name/stub.py to exercises/07_name/my.py, which git
does not follow. Write there. Each folder holds

    README.md, README_zh.md   the exercise, in English and in Chinese
    stub.py                   signatures and docstrings, to be filled
    reference.py              the answer: the library's own functions, wherever it has them
    test.py                   functions test_...(mine); `mine` is the module that is tested

and those that change the library itself

    change.patch              the answer, in place of stub.py and reference.py; test.py tests
                              the package as it stands
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).resolve().parent


@dataclass
class Exercise:
    folder: Path

    @property
    def number(self) -> int:
        return int(self.folder.name.split("_")[0])

    @property
    def title(self) -> str:
        """The first lines of its READMEs: "Merge a pair  合并一对"."""
        paths = [self.folder / name for name in ("README.md", "README_zh.md")]
        firsts = [path.read_text(encoding="utf-8").splitlines()[0] for path in paths]
        return "  ".join(first.lstrip("# ") for first in firsts)

    @property
    def changes_library(self) -> bool:
        return (self.folder / "change.patch").exists()

    def module(self, name: str) -> ModuleType:
        """my.py, stub.py, reference.py or test.py of the folder, imported anew."""
        path = self.folder / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"{self.folder.name}.{name}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def failures(self, tested: str) -> dict[str, Exception | None]:
        """Each test of test.py, and how it fails for the module `tested`: None where it passes.

        An exercise that changes the library tests the package that is imported; `tested` is then of
        no meaning.
        """
        tests = self.module("test")
        arguments = [] if self.changes_library else [self.module(tested)]
        results: dict[str, Exception | None] = {}
        for name in [name for name in vars(tests) if name.startswith("test_")]:
            try:
                getattr(tests, name)(*arguments)
                results[name] = None
            except Exception as error:
                results[name] = error
        return results


def exercises() -> list[Exercise]:
    """All of them, in order."""
    return [Exercise(folder) for folder in sorted(FOLDER.glob("[0-9][0-9]_*"))]
