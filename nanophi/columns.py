"""Chinese text in the columns of a terminal: its width, line breaks, and two texts side by side.

A terminal shows a Chinese character two columns wide, so `len` does not tell how much room a text
takes.
"""

import re
import shutil
import unicodedata

UNIT = re.compile(r"[!-~]+|.", re.DOTALL)
CLOSING = "，。、；：？！）》」』”’…"  # marks that never begin a line
OPENING = "（《「『“‘"  # marks that never end one


def display_width(text: str) -> int:
    """Columns that a text takes: 2 for a wide character, 0 for a combining one, otherwise 1.

    >>> display_width("感冒a")
    5
    """
    width = 0
    for char in text:
        if unicodedata.combining(char):
            continue
        wide = unicodedata.east_asian_width(char) in ("W", "F")
        width += 2 if wide else 1
    return width


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` columns, broken between characters as Chinese is.

    A closing mark never begins a line, and takes the character before it to the new line; an
    opening mark never ends one. A Latin word or a number stays whole where it fits into a line:

    >>> wrap("感冒了，快休息", width=6)
    ['感冒', '了，快', '休息']
    >>> wrap("用一块 GPU 训练", width=8)
    ['用一块', 'GPU 训练']
    """
    lines = []
    for paragraph in text.split("\n"):
        line: list[str] = []
        is_broken = False  # then a blank that would begin the next line is dropped
        for unit in units_of(paragraph, width):
            if display_width("".join(line) + unit) > width:
                keep = len(line)
                if keep > 1 and (unit in CLOSING or line[-1] in OPENING):
                    keep -= 1
                lines.append("".join(line[:keep]).rstrip())
                line = line[keep:]
                is_broken = True
            if line or unit != " " or not is_broken:
                line.append(unit)
        lines.append("".join(line))
    return lines


def units_of(paragraph: str, width: int) -> list[str]:
    """What is not broken: Latin words with their signs, if they fit, and other characters.

    >>> units_of("用GPU 训练", width=6)
    ['用', 'GPU', ' ', '训', '练']
    """
    units: list[str] = []
    for unit in UNIT.findall(paragraph):
        units += [unit] if display_width(unit) <= width else list(unit)
    return units


def side_by_side(titles: list[str], texts: list[str], width: int | None = None) -> str:
    """Texts in columns under their titles. width: of the whole; None: that of the terminal.

    >>> print(side_by_side(["甲", "B"], ["感冒了要休息", "ok"], width=23))
    甲         | B
    ---------- | ----------
    感冒了要休 | ok
    息         |
    """
    width = width or shutil.get_terminal_size((100, 24)).columns
    borders = 3 * (len(texts) - 1)  # " | " between two columns
    column = max((width - borders) // len(texts), 10)
    cells = []
    for title, text in zip(titles, texts, strict=True):
        cells.append([*wrap(title, column), "-" * column, *wrap(text, column)])
    rows = []
    for number in range(max(map(len, cells))):
        lines = [cell[number] if number < len(cell) else "" for cell in cells]
        padded = [line + " " * (column - display_width(line)) for line in lines]
        rows.append(" | ".join(padded).rstrip())
    return "\n".join(rows)
