"""Names that are imported on first use (PEP 562), so that `import nanophi` stays light."""

import importlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any


def on_first_use(package: str, module_of: dict[str, str] | None = None) -> Callable[[str], Any]:
    """A `__getattr__` for a package: its submodules, and names whose modules are given."""

    def __getattr__(name: str) -> Any:
        if module_of is not None and name in module_of:
            return getattr(importlib.import_module(module_of[name]), name)
        if name.startswith("_") or find_spec(f"{package}.{name}") is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return importlib.import_module(f"{package}.{name}")

    return __getattr__
