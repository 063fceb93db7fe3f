"""Questions and answers as pictures: an SVG of speech bubbles, and one that moves.

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


# ---- the moving picture: a model learns to answer

MOVING_HEIGHT = 330
SECONDS = 14  # of one round
LEARNING = 0.7  # share of a round in which the curve is drawn; then the last answer stays
PLOT = (60, 96, 300, 190)  # left, top, width, height of the curve


def write_moving(
    path: str | Path, question: str, losses: list[float], moments: list[tuple[int, str]]
) -> None:
    """Write an SVG in which the loss of SFT is drawn, and the answer changes with it.

    losses: of each step, from 1. moments: (step, the answer at that step), the first one before
    training, at step 0, and the last one at the end

    An SVG moves by itself (SMIL): the window through which the curve is seen becomes wider, and
    texts appear and vanish at shares of the round.
    """
    left, top, width, height = PLOT
    steps = len(losses)
    highest = max(losses)
    points = [
        (left + width * i / (steps - 1), top + height * (1 - loss / highest))
        for i, loss in enumerate(losses)
    ]
    curve = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {MOVING_HEIGHT}" '
        f'font-family="{FONTS}" font-size="{SIZE}">',
        f'<rect width="{WIDTH}" height="{MOVING_HEIGHT}" fill="#ffffff"/>',
        bubble("question", question, MARGIN)[0],
        f'<path d="M{left} {top} V{top + height} H{left + width}" fill="none" stroke="#8b949e"/>',
        f'<text x="{left}" y="{top - 12}" fill="#59636e" font-size="13">loss</text>',
        f'<text x="{left + width - 10}" y="{top + height + 22}" fill="#59636e" font-size="13">'
        f"step {steps}</text>",
        f'<clipPath id="seen"><rect x="{left}" y="0" width="{width}" height="{MOVING_HEIGHT}">'
        f'<animate attributeName="width" values="0;{width};{width}" keyTimes="0;{LEARNING};1" '
        f'dur="{SECONDS}s" repeatCount="indefinite"/></rect></clipPath>',
        f'<polyline points="{curve}" fill="none" stroke="#1f6feb" stroke-width="2.5" '
        'clip-path="url(#seen)"/>',
    ]
    begins = [LEARNING * step / steps for step, _ in moments]
    ends = [*begins[1:], 1.0]
    for number, ((step, answer), begin, end) in enumerate(zip(moments, begins, ends, strict=True)):
        is_last = number == len(moments) - 1
        parts.append(moment(step, answer, begin, end, stays=is_last))
    parts.append("</svg>")
    write_text(path, "\n".join(parts) + "\n")


def moment(step: int, answer: str, begin: float, end: float, stays: bool) -> str:
    """The answer of one step, seen from `begin` to `end`, shares of the round.

    stays: whether it is what a viewer shows who does not move pictures
    """
    left = PLOT[0] + PLOT[2] + 48
    lines = [f"step {step}", *wrap(answer, 46)][:7]
    texts = []
    for i, line in enumerate(lines):
        colour = "#59636e" if i == 0 else "#1f2328"
        y = PLOT[1] + 8 + LINE * i
        texts.append(f'<text x="{left}" y="{y}" fill="{colour}">{escape(line)}</text>')
    shown = "1;0" if begin == 0 else f"0;1;{1 if end == 1 else 0}"
    times = f"0;{end:.3f}" if begin == 0 else f"0;{begin:.3f};{min(end, 0.999):.3f}"
    return (
        f'<g opacity="{int(stays)}"><animate attributeName="opacity" calcMode="discrete" '
        f'values="{shown}" keyTimes="{times}" dur="{SECONDS}s" repeatCount="indefinite"/>\n'
        + "\n".join(texts)
        + "</g>"
    )
