"""Questions and answers as a picture: an SVG of speech bubbles, drawn in the reader's own Chinese font."""

from html import escape
from pathlib import Path

from nanophi.files import write_text
from nanophi.infer.modes import display_width, wrap

WIDTH, MARGIN, SIZE, LINE = 820, 24, 16, 26  # pixels: picture, border, font, distance of lines
COLUMNS = 68  # of a bubble at most; a Chinese character takes two, each of SIZE / 2 pixels
STYLE = {"question": ("#1f6feb", "#ffffff"), "answer": ("#eef1f4", "#1f2328")}  # background, text


def bubble(kind: str, text: str, top: int) -> tuple[str, int]:
    """One bubble, questions at the right edge and answers at the left; returns its SVG and its height."""
    lines = wrap(text, COLUMNS)
    background, colour = STYLE[kind]
    width = max(map(display_width, lines)) * SIZE // 2 + 2 * SIZE
    height = len(lines) * LINE + SIZE
    left = WIDTH - MARGIN - width if kind == "question" else MARGIN
    rows = [
        f'<text x="{left + SIZE}" y="{top + SIZE // 2 + LINE * (i + 1) - 8}" fill="{colour}">{escape(line)}</text>'
        for i, line in enumerate(lines)
    ]
    box = f'<rect x="{left}" y="{top}" width="{width}" height="{height}" rx="12" fill="{background}"/>'
    return "\n".join([box, *rows]), height


def write_chat(path: str | Path, turns: list[tuple[str, str]]) -> None:
    """(question, answer) pairs -> an SVG file."""
    parts, top = [], MARGIN
    for question, answer in turns:
        for kind, text in (("question", question), ("answer", answer)):
            drawn, height = bubble(kind, text, top)
            parts.append(drawn)
            top += height + 12
        top += 8
    fonts = "'PingFang SC','Microsoft YaHei','Noto Sans CJK SC','Noto Sans SC',sans-serif"
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" font-family="{fonts}"'
    )
    body = "\n".join(parts)
    white = f'<rect width="{WIDTH}" height="{top}" fill="#ffffff"/>'
    write_text(path, f'{head} font-size="{SIZE}">\n{white}\n{body}\n</svg>\n')
