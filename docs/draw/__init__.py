"""The pictures of docs/, drawn from numbers that the library computes.

    python -m docs.draw                  draws all of them into docs/figures
    python -m docs.draw attention_map    draws one

A picture is a module of this folder with two functions:

    data() -> dict             its numbers and words, as JSON can hold them
    draw(figure, data)         draws them with matplotlib

Its data stand in the SVG as well, in a comment. So a test can compute them again and compare,
whatever matplotlib makes of them.
"""

import importlib
import json
import math
import re
import warnings
from pathlib import Path
from typing import Any

FIGURES = Path(__file__).resolve().parents[1] / "figures"
BLUE, ORANGE, GREY, GREEN = "#1f6feb", "#d9730d", "#8b949e", "#2da44e"
SHOWN_FONTS = "'DejaVu Sans', 'Noto Sans CJK SC', 'PingFang SC', 'Microsoft YaHei', sans-serif"
COMMENT = re.compile(r"<!-- data: (.*?) -->", re.DOTALL)


def names() -> list[str]:
    own = Path(__file__).parent.glob("*.py")
    return sorted(path.stem for path in own if not path.stem.startswith("_"))


def rounded(value: Any) -> Any:
    """Numbers with four digits, in lists and dicts too: {"x": 0.123456} -> {"x": 0.1235}."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        assert math.isfinite(value), "a picture has a number that is not finite"
        return float(f"{value:.4g}")
    return value


def data_of(name: str) -> dict:
    return rounded(importlib.import_module(f"docs.draw.{name}").data())


def data_in(path: Path) -> dict:
    """The data that stand in an SVG."""
    found = COMMENT.search(path.read_text(encoding="utf-8"))
    assert found is not None, f"{path.name} holds no data"
    return json.loads(found.group(1).replace("- -", "--"))


def write(name: str, data: dict, path: Path) -> None:
    """Draw a picture from its data."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    module = importlib.import_module(f"docs.draw.{name}")
    style = {
        "svg.fonttype": "none",  # words stay words, in a font of the reader's
        "svg.hashsalt": "nanophi",  # the same picture twice has the same bytes
        "font.family": ["DejaVu Sans"],
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its font has no Chinese; the reader's has
        figure = Figure(figsize=getattr(module, "SIZE", (7, 3.2)), layout="constrained")
        module.draw(figure, data)
        figure.savefig(path, format="svg", metadata={"Date": None}, facecolor="white")
    text = path.read_text(encoding="utf-8")
    held = json.dumps(data, ensure_ascii=False).replace("--", "- -")
    text = text.replace("font-family: 'DejaVu Sans'", f"font-family: {SHOWN_FONTS}")
    text = text.replace("</svg>", f"<!-- data: {held} -->\n</svg>")
    path.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n", encoding="utf-8")
