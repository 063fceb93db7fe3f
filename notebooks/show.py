"""What the notebooks show things with: HTML in Jupyter and VS Code, text elsewhere."""

import io
import sys
import warnings
from collections.abc import Callable, Sequence
from html import escape
from importlib.util import find_spec

COLOURS = ("#cfe3ff", "#ffe3b8", "#d3f2d6", "#f7d3e6", "#e4dbff")
BOX = "padding:2px 3px;margin:1px;border-radius:3px;color:#000;display:inline-block"


def has(package: str) -> bool:
    return find_spec(package) is not None


def in_notebook() -> bool:
    """Whether a Jupyter kernel runs this code; VS Code uses the same one."""
    return "ipykernel" in sys.modules


def show(html: str, plain: str) -> None:
    """Show HTML in a notebook; print the plain text elsewhere."""
    if in_notebook():
        from IPython.display import HTML, display

        display(HTML(html))
    else:
        print(plain)


def show_tokens(pieces: Sequence[str], shares: Sequence[float] | None = None) -> None:
    """Tokens as boxes: in turning colours, or the darker the larger a share, 0 to 1."""
    words = [piece.replace("\n", "\\n") for piece in pieces]
    colours = [COLOURS[number % len(COLOURS)] for number in range(len(words))]
    notes = words
    if shares is not None:
        colours = [f"rgba(31, 111, 235, {0.7 * share:.2f})" for share in shares]
        pairs = zip(words, shares, strict=True)
        notes = [f"{word}:{share:.2f}" if share else word for word, share in pairs]
    boxes = []
    for word, colour, note in zip(words, colours, notes, strict=True):
        attributes = f'style="{BOX};background:{colour}" title="{escape(note)}"'
        boxes.append(f"<span {attributes}>{escape(word)}</span>")
    html = f'<div style="background:#fff;line-height:1.9">{"".join(boxes)}</div>'
    show(html, "|".join(notes))


def plot(draw: Callable, plain: str, size: tuple[float, float] = (6.4, 3.0)) -> None:
    """Show what draw(figure) draws; without matplotlib or a notebook, print `plain`."""
    if not has("matplotlib"):
        print(plain)
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    draw(figure)
    picture = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fonts without Chinese
        figure.savefig(picture, format="svg", facecolor="white")
    svg = picture.getvalue()
    show(svg[svg.index("<svg") :], plain)


def vary(function: Callable, name: str, values: Sequence) -> None:
    """Call a function with a slider's value; without ipywidgets, with each value."""
    if in_notebook() and has("ipywidgets"):
        from ipywidgets import SelectionSlider, interact

        interact(function, **{name: SelectionSlider(options=values)})
    else:
        for value in values:
            function(**{name: value})
