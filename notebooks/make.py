"""Notebooks from percent files: `python -m notebooks.make` writes an .ipynb for each.

The .py is what one edits, and what git shows well. The .ipynb beside it is what one
opens. A percent file is Python whose comments cut it into cells:

    # %% [markdown]
    # ## A title
    #
    # Some text.

    # %%
    print(6 * 7)

gives a cell of text, of three lines, and a cell of code. An .ipynb is JSON, in version
4.5 of nbformat. It holds no outputs, and the same .py always gives the same bytes.
"""

import json
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
CODE, TEXT = "# %%", "# %% [markdown]"
FORMAT = {"nbformat": 4, "nbformat_minor": 5}
PYTHON = {"display_name": "Python 3", "language": "python", "name": "python3"}


def sources() -> list[Path]:
    """The percent files of this folder: those that begin with a cell."""
    files = sorted(FOLDER.glob("*.py"))
    return [path for path in files if path.read_text(encoding="utf-8").startswith(CODE)]


def cells_of(percent: str) -> list[tuple[str, str]]:
    """A percent file -> (kind, source) of each cell.

    >>> cells_of("# %% [markdown]\\n# *a*\\n#\\n# b\\n\\n# %%\\nprint(1)\\n")
    [('markdown', '*a*\\n\\nb'), ('code', 'print(1)')]
    """
    cells: list[tuple[str, list[str]]] = []
    for line in percent.splitlines():
        if line in (CODE, TEXT):
            cells.append(("markdown" if line == TEXT else "code", []))
        elif cells[-1][0] == "markdown":
            cells[-1][1].append(line.removeprefix("#").removeprefix(" "))
        else:
            cells[-1][1].append(line)
    return [(kind, "\n".join(lines).strip("\n")) for kind, lines in cells]


def notebook_of(percent: str) -> str:
    """A percent file -> the text of an .ipynb."""
    cells = []
    for number, (kind, source) in enumerate(cells_of(percent), start=1):
        cell = {"cell_type": kind, "id": f"cell-{number:02}", "metadata": {}}
        if kind == "code":
            cell |= {"execution_count": None, "outputs": []}
        cells.append(cell | {"source": source.splitlines(keepends=True)})
    metadata = {"kernelspec": PYTHON, "language_info": {"name": "python"}}
    notebook = {"cells": cells, "metadata": metadata, **FORMAT}
    return json.dumps(notebook, ensure_ascii=False, indent=1, sort_keys=True) + "\n"


def main() -> None:
    for path in sources():
        notebook = notebook_of(path.read_text(encoding="utf-8"))
        path.with_suffix(".ipynb").write_text(notebook, encoding="utf-8")
        print(f"{path.stem}.ipynb: written")


if __name__ == "__main__":
    main()
