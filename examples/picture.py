"""Questions and answers as a picture: an SVG of speech bubbles.

SVG is text, so the viewer draws the Chinese characters in a font of its own.

    ┌────────────────────────────────┐
    │              ( 感冒了怎么办？ ) │   a question, at the right edge
    │ ( 多喝水，早点休息。 )          │   its answer, at the left edge; a wrong one is marked
    └────────────────────────────────┘
"""

from html import escape
from pathlib import Path

from nanophi.columns import display_width, wrap
from nanophi.files import write_text

# All in pixels.
WIDTH = 820  # of the picture
MARGIN = 24  # between bubbles and the edge of the picture
SIZE = 16  # of the font; also the space around the text of a bubble, at its left and right
LINE = 26  # from one line of text to the next
GAP = 12  # between two bubbles
TURN_GAP = 8  # more of it, behind an answer

COLUMNS = 68  # of a bubble at most; a Chinese character takes two, each of SIZE / 2 pixels
COLOURS = {  # back, text
    "question": ("#1f6feb", "#ffffff"),
    "answer": ("#eef1f4", "#1f2328"),
    "wrong": ("#ffebe9", "#1f2328"),
}
NOTE_COLOUR = "#cf222e"
WRONG = "✗ 答错了 wrong"
FONTS = "'PingFang SC','Microsoft YaHei','Noto Sans CJK SC','Noto Sans SC',sans-serif"


def bubble(kind: str, text: str, top: int, note: str = "") -> tuple[str, int]:
    """One bubble whose upper edge is at `top`: its SVG and its height.

    kind: "question", "answer" or "wrong". note: stands below the text, in the colour of the kind
    """
    lines = wrap(text, COLUMNS) + ([note] if note else [])
    background, colour = COLOURS[kind]
    width = max(map(display_width, lines)) * SIZE // 2 + 2 * SIZE
    height = len(lines) * LINE + SIZE
    left = WIDTH - MARGIN - width if kind == "question" else MARGIN
    parts = [
        f'<rect x="{left}" y="{top}" width="{width}" height="{height}" rx="12" '
        f'fill="{background}"/>'
    ]
    x = left + SIZE
    first_baseline = top + SIZE // 2 + LINE - 8
    for i, line in enumerate(lines):
        y = first_baseline + LINE * i
        is_note = bool(note) and i == len(lines) - 1
        fill = NOTE_COLOUR if is_note else colour
        parts.append(f'<text x="{x}" y="{y}" fill="{fill}">{escape(line)}</text>')
    return "\n".join(parts), height


def write_chat(path: str | Path, turns: list[tuple[str, str, bool]]) -> None:
    """Write turns as an SVG file: (question, answer, whether the answer is right)."""
    bubbles = []
    top = MARGIN
    for question, answer, is_right in turns:
        drawn_question, height = bubble("question", question, top)
        top += height + GAP
        if is_right:
            drawn_answer, height = bubble("answer", answer, top)
        else:
            drawn_answer, height = bubble("wrong", answer, top, WRONG)
        top += height + GAP + TURN_GAP
        bubbles += [drawn_question, drawn_answer]
    picture = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" '
        f'font-family="{FONTS}" font-size="{SIZE}">',
        f'<rect width="{WIDTH}" height="{top}" fill="#ffffff"/>',
        *bubbles,
        "</svg>",
    ]
    write_text(path, "\n".join(picture) + "\n")
