"""Cleaning rules: named functions str -> str, each alone readable and testable. `clean.py` applies them.

What the rules must not do is half of their job: Chinese punctuation, decimals, URLs, code and Latin words stay as they
are (the original turned `4.567Ga` into `4。567Ga` and deleted every letter s that stood twice). Outside of tags,
entities and mojibake every ASCII letter and digit of NFKC(text) is still there, in order.
"""

import html
import re
import unicodedata
from collections.abc import Callable
from functools import cache

HAN = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff〇"
CODE = re.compile(r"(```.*?```|`[^`\n]+`)", re.S)  # Markdown's code is shown as it is


def outside_code(rule: Callable[[str], str], text: str) -> str:
    """The rule, applied to what is no Markdown code."""
    if "`" not in text:
        return rule(text)
    return "".join(part if i % 2 else rule(part) for i, part in enumerate(CODE.split(text)))


# UTF-8 that was read as Windows-1252: ä½\xa0å¥½ for 你好. The first byte of a Chinese character is E3 to E9 (ã to é),
# that of Chinese punctuation E2 or EF; bytes 80 to 9F are other characters there.
_HIGH = "".join(bytes([b]).decode("cp1252", "ignore") or chr(b) for b in range(0x80, 0xC0))
MISREAD = re.compile(f"(?:[âã-éï][{re.escape(_HIGH)}]{{2}})+")
LOST = re.compile(r"(?:锟斤拷){2,}锟?|(?:烫烫|屯屯){3,}|\ufffd+|[\ue000-\uf8ff\U000f0000-\U0010ffff]+")


def repair_mojibake(text: str) -> str:
    """UTF-8 read as Windows-1252 becomes what it was, if that is Chinese; what is lost for good goes: U+FFFD, its
    double error 锟斤拷锟斤拷, and private-use characters, which mean something in one font only."""
    return LOST.sub("", MISREAD.sub(_reread, text))


def _reread(match: re.Match) -> str:
    raw = b"".join(char.encode("cp1252") if char in _CP1252 else bytes([ord(char)]) for char in match[0])
    try:
        read = raw.decode()
    except UnicodeDecodeError:
        return match[0]
    return read if re.search(f"[{HAN}\u3000-\u303f\uff00-\uffef]", read) else match[0]


_CP1252 = frozenset(bytes(b for b in range(256) if b not in (0x81, 0x8D, 0x8F, 0x90, 0x9D)).decode("cp1252"))


TAG_NAMES = (
    "p|br|div|span|a|b|i|u|em|strong|h[1-6]|ul|ol|li|table|tbody|thead|tr|td|th|img|font|center|hr|sup|sub|blockquote"
)
# Attributes need a value: `a <b and c> d` is no tag; nor is one letter right behind a word: List<a> is code.
TAG = re.compile(
    rf"""<(?!(?<=\w<)[abiup]>)(/?)({TAG_NAMES})((?:\s+[\w:-]+\s*=\s*(?:"[^"<>]*"|'[^'<>]*'|[^\s"'<>]+))*)\s*/?>""", re.I
)
INVISIBLE_HTML = re.compile(r"<!--.*?-->|<(script|style)\b[^<>]*>.*?</\1\s*>", re.S | re.I)
ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")  # with `;`: not in `?a=1&copy=2`
BREAKING_TAGS = ("p", "br", "div", "li", "tr", "h1", "h2", "h3", "h4", "h5", "h6", "hr")


def strip_html(text: str) -> str:
    """Entities become characters, to the bottom of `&amp;lt;`; comments, scripts and well-known tags go. Markdown code
    stays, and so does any other `<...>`: it is code or mathematics."""
    return outside_code(_strip_html, text) if "&" in text or "<" in text else text


def _strip_html(text: str) -> str:
    before = None
    while text != before:  # each replacement shortens the text
        before = text
        text = ENTITY.sub(lambda m: html.unescape(m[0]), INVISIBLE_HTML.sub("", text) if ">" in text else text)
    return TAG.sub(lambda m: "\n" if m[2].lower() in BREAKING_TAGS else "", text)


INVISIBLE = re.compile(
    # Controls but \t and \n; zero-width and directional marks; half surrogate pairs. U+200D stays: it joins emoji.
    r"[\ud800-\udfff\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u200b\u200c\u200e\u200f\u202a-\u202e\u2060-\u2064\ufeff\ufffe\uffff]"
)


def drop_invisible(text: str) -> str:
    """Remove characters one cannot see; every kind of line break becomes \\n."""
    return INVISIBLE.sub("", re.sub(r"\r\n?|\x0b|\x0c|\x85|\u2028|\u2029", "\n", text))


# NFKC would make most of these ASCII (，->, …->...), lose a power, an index or a unit (m² -> m2, ㎡ -> m2, ② -> 2), run
# a fraction into the number before it (5½ -> 51⁄2), or tear a lone accent or a double prime apart.
KEPT_BY_NFKC = re.compile(r"[，。？！：；（）…～²³¹⁰-₟¼-¾⅐-⅟↉″‴⁗ªº´¨¯¸①-⓿㈀-㋿㌀-㏿]+")


@cache
def _changed_by_nfkc() -> re.Pattern:
    """What NFKC would change, alone or as a mark on the letter before it."""
    chars = (
        chr(code) for code in range(0x80, 0x110000) if not 0xAC00 <= code <= 0xD7A3 and not 0xD800 <= code <= 0xDFFF
    )
    changed = [c for c in chars if not unicodedata.is_normalized("NFKC", c) or unicodedata.combining(c)]
    jamo = "\u1161-\u1175\u11a8-\u11c2"  # vowels and finals join the syllable before them
    return re.compile(f"[{''.join(c for c in changed if not KEPT_BY_NFKC.match(c))}{jamo}]")


def nfkc(text: str) -> str:
    """Unicode NFKC (full-width letters and digits become ordinary ones), Chinese punctuation and units excepted."""
    if not _changed_by_nfkc().search(text):
        return text
    parts, end = [], 0
    for kept in KEPT_BY_NFKC.finditer(text):
        parts += [unicodedata.normalize("NFKC", text[end : kept.start()]), kept[0]]
        end = kept.end()
    return "".join(parts) + unicodedata.normalize("NFKC", text[end:])


@cache
def _opencc(config: str):
    """(converter, the characters that it changes): most texts hold none of these and need no conversion."""
    import opencc

    convert = opencc.OpenCC(config).convert
    blocks = ((0x3400, 0x4DC0), (0x4E00, 0xA000), (0xF900, 0xFB00), (0x20000, 0x32000))
    han = [chr(code) for first, last in blocks for code in range(first, last)]
    changed = [a for a, b in zip(han, convert("\n".join(han)).split("\n"), strict=True) if a != b]
    return convert, re.compile(f"[{''.join(changed)}]")


# OpenCC makes 薴 苧, and that 苎, another plant, the next time.
NOT_TWICE = "薴"


def simplify(text: str, config: str = "t2s") -> str:
    """Traditional -> simplified characters by OpenCC's phrase tables; tw2s and hk2s know Taiwan's and Hong Kong's."""
    convert, traditional = _opencc(config)
    if not traditional.search(text):
        return text
    return NOT_TWICE.join(convert(part) for part in text.split(NOT_TWICE))


# Not `.` (1.000, ...), not + - * = # / (C++, --, ==); ASCII ! or ? only after Han, or three behind a word: `!!x` is
# code, and a line may begin with `???` or `!!!` as Markdown.
REPEATED = re.compile(rf"([，。？！：；、～])\1+|(…)…{{2,}}|(—)—{{2,}}|(?<=[{HAN}])([!?])\4+|(?<=\S)([!?])\5{{2,}}")


def collapse_repeated(text: str) -> str:
    """`。。。。` -> `。`, `!!!!` -> `!`; the ellipsis `……` and the dash `——` are two characters each and stay so."""

    def once(match: re.Match) -> str:
        return match[2] * 2 if match[2] else match[3] * 2 if match[3] else match[0][0]

    return REPEATED.sub(once, text)


def tidy_space(text: str) -> str:
    """Trim the text and its lines' ends, at most one blank line, no ideographic indentation (code keeps its own), one
    space at most between Han."""
    text = re.sub(
        r"(?<![^\S\n])[^\S\n]++$", "", text, flags=re.M
    )  # from a run's beginning, so that long ones cost no n^2
    text = re.sub(rf"^[^\S\n]*\u3000[^\S\n]*|\A\s+(?=[{HAN}])", "", text, flags=re.M)
    text = re.sub(rf"(?<=[{HAN}，。？！：；])[^\S\n]{{2,}}(?=[{HAN}])", " ", text)
    return re.sub(r"\n{3,}", "\n\n", text).lstrip("\n").rstrip()


# ASCII punctuation behind Han and before Han, a space, a quotation mark or the line's end is Chinese; so is what
# brackets hold that begins with Han. `:` and `.` need a line's end or Han right behind them, as in 北京.
_BEHIND, _BEFORE = f"[{HAN}”’）》】」』]", f"[{HAN}“‘（《【「『]"
TO_CHINESE = re.compile(
    rf"(?<={_BEHIND})(?:([,;?!]) ?(?={_BEFORE})|([,;:?!.])(?=[”’」』）]|\n|\Z)|(:) ?(?={_BEFORE}))"
    rf"|(?<=[{HAN}])\(([{HAN}][^()（）\n]*)[)）]|（([^()（）\n]*)\)"
)
WIDE = dict(zip(",;:?!.()", "，；：？！。（）", strict=True))
NARROW = {wide: narrow for narrow, wide in WIDE.items()}


def punctuate(text: str) -> str:
    """Punctuation by context: Chinese between Han, ASCII in a text without any. Code and indented lines stay."""
    if re.search(f"[{HAN}\u3040-\u30ff]", text):
        return outside_code(lambda part: re.sub(r"^(?! {4}|\t).+$", _widen, part, flags=re.M), text)
    if not re.search("[A-Za-z]", text):
        return text
    text = re.sub(r"(?<=[A-Za-z0-9）])([，。；：？！])(?=[A-Za-z（“‘])", lambda m: NARROW[m[1]] + " ", text)
    text = re.sub(r"(?<=[A-Za-z0-9）])[，。；：？！](?=\s|\Z|）)", lambda m: NARROW[m[0]], text)
    text = re.sub(r"(?<=[A-Za-z0-9,.;:?!])（", " (", text)
    return re.sub(r"）(?=[A-Za-z0-9])", ") ", text).replace("（", "(").replace("）", ")")


def _widen(line: re.Match) -> str:
    def wide(match: re.Match) -> str:
        mark, bracketed = match[1] or match[2] or match[3], match[4] or match[5]
        return WIDE[mark] if mark else f"（{bracketed or ''}）"

    return TO_CHINESE.sub(wide, line[0])


def final_punctuation(text: str) -> str:
    """A text that ends in Han, or in a closing bracket right after Han, gets its 。; anything else ends as it is."""
    return re.sub(rf"(?<=[{HAN}])([”’）》】」』)\]]?)\Z", r"\1。", text)


Rule = Callable[[str], str]
RULES: dict[str, Rule] = {
    "mojibake": repair_mojibake,  # before NFKC, which changes its bytes
    "html": strip_html,
    "invisible": drop_invisible,
    "space": tidy_space,  # before NFKC, which makes ideographic spaces ordinary ones
    "nfkc": nfkc,
    "simplified": simplify,
    "repeated": collapse_repeated,
    "punctuation": punctuate,
    "final": final_punctuation,
}
