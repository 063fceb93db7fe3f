"""The notebooks run from top to bottom, and each .ipynb is that of its .py."""

import json
import re
import sys
import time
from types import ModuleType

import pytest

from notebooks import make, show

SOURCES = make.sources()


def name_of(path) -> str:
    return path.stem


def test_all_notebooks_are_found():
    assert [path.stem for path in SOURCES] == ["look_inside", "research", "weekend_zh"]
    assert {path.stem for path in make.FOLDER.glob("*.ipynb")} == {path.stem for path in SOURCES}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_notebook_is_that_of_its_source(path):
    written = path.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert written == make.notebook_of(path.read_text(encoding="utf-8")), (
        "python -m notebooks.make writes it"
    )
    notebook = json.loads(written)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = notebook["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    assert all(cell["source"] for cell in cells)
    assert all(cell["outputs"] == [] for cell in cells if cell["cell_type"] == "code")


def test_a_percent_file_becomes_cells():
    percent = "# %% [markdown]\n# # A\n#\n# - b\n#   c\n\n# %%\nx = 1\n\n\n# %%\n# d\nprint(x)\n"
    assert make.cells_of(percent) == [
        ("markdown", "# A\n\n- b\n  c"),
        ("code", "x = 1"),
        ("code", "# d\nprint(x)"),
    ]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_notebook_runs(path, at_small, capsys):
    """As a script, at a trained small model. Few learners wait longer than a minute."""
    begun = time.process_time()
    code = path.read_text(encoding="utf-8")
    exec(compile(code, str(path), "exec"), {"__name__": "__main__"})
    assert time.process_time() - begun < 60
    assert len(capsys.readouterr().out.splitlines()) > 20


# ---- what they show with


class Display(ModuleType):
    """Stands in for IPython.display."""

    def __init__(self):
        super().__init__("IPython.display")
        self.shown = []
        self.HTML = str
        self.display = self.shown.append


@pytest.fixture
def display(monkeypatch):
    stand_in = Display()
    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", stand_in)
    return stand_in


def test_tokens_are_shown_in_colour(display, capsys):
    show.show_tokens(["月亮", "<b>", "\n"])
    show.show_tokens(["月亮", "。"], [0.5, 0])
    assert capsys.readouterr().out == ""
    turning, shaded = display.shown
    assert re.findall(r">([^<]+)</span>", turning) == ["月亮", "&lt;b&gt;", "\\n"]
    assert len(set(re.findall("background:(#......)", turning))) == 4  # and the white behind
    assert re.findall(r"rgba\(31, 111, 235, (....)\)", shaded) == ["0.35", "0.00"]


def test_without_a_notebook_there_is_text(capsys):
    show.show_tokens(["月亮", "\n"])
    show.show_tokens(["月亮", "。"], [0.5, 0])
    show.vary(print, "end", ["a", "b"])
    show.plot(lambda figure: figure.subplots(), "no picture")
    assert capsys.readouterr().out == "月亮|\\n\n月亮:0.50|。\nabno picture\n"


def test_a_value_gets_a_slider(display, monkeypatch):
    made = []
    widgets = ModuleType("ipywidgets")
    widgets.SelectionSlider = lambda options: options
    widgets.interact = lambda function, **sliders: made.append((function, sliders))
    monkeypatch.setitem(sys.modules, "ipywidgets", widgets)
    monkeypatch.setattr(show, "has", lambda package: True)
    show.vary(print, "end", ["a", "b"])
    assert made == [(print, {"end": ["a", "b"]})]


def test_a_picture_is_svg(display, monkeypatch, capsys):
    show.plot(lambda figure: figure.subplots().plot([1, 2]), "no picture")
    assert capsys.readouterr().out == ""
    assert display.shown[0].startswith("<svg")
    monkeypatch.setattr(show, "has", lambda package: False)
    show.plot(None, "no picture")
    assert capsys.readouterr().out == "no picture\n"
