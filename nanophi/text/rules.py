"""Cleaning rules: named functions str -> str, each alone readable and testable. `clean.py` applies them.

What the rules must not do is half of their job: Chinese punctuation, decimals, URLs, code and Latin words stay as they
are (the original turned `4.567Ga` into `4。567Ga` and deleted every letter s that stood twice). Outside of tags,
entities and mojibake every ASCII letter and digit of NFKC(text) is still there, in order.
"""

import html
import re
import unicodedata
from collections.abc import Callable
from functools import cache, partial
from html.entities import name2codepoint

HAN = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff〇"
ASTRAL = "\U00010000"  # from here on `re` looks through a class of characters one by one, below in one step
FENCED = re.compile(r"((?:^[^\S\n]*)(?:```|~~~).*?(?:^[^\S\n]*(?:```|~~~)|\Z))", re.S | re.M)
CODE = re.compile(
    rf"{FENCED.pattern[:-1]}|`[^`\n]+`)", re.S | re.M
)  # Markdown's code, an unclosed fence to the end
CODE_OR_URL = re.compile(
    rf"{CODE.pattern[:-1]}|https?://[^\s，。；！？（）《》“”‘’]+)", re.S | re.M
)


def outside_code(rule: Callable[[str], str], text: str, code: re.Pattern = CODE) -> str:
    """The rule, applied to what is no code."""
    if "`" not in text and "~~~" not in text and (code is CODE or "://" not in text):
        return rule(text)
    return "".join(part if i % 2 else rule(part) for i, part in enumerate(code.split(text)))


# UTF-8 that was read as Windows-1252 or Latin-1: ä½\xa0å¥½ for 你好. A Chinese character begins with the byte E3 to E9
# (ã to é), Chinese punctuation with E2 or EF, rare characters and emoji with F0. `café…”` is such a triple too, but
# behind a letter and alone.
_CP1252 = {
    bytes([b]).decode("cp1252"): b for b in range(256) if b not in (0x81, 0x8D, 0x8F, 0x90, 0x9D)
}
_HIGH = (
    re.escape("".join(char for char, byte in _CP1252.items() if 0x80 <= byte < 0xC0)) + "\x80-\x9f"
)
_TRIPLE = f"(?:[âã-éï][{_HIGH}]{{2}}|ð[{_HIGH}]{{3}})"
MISREAD = re.compile(f"(?<![A-Za-z]){_TRIPLE}+|{_TRIPLE}{{2,}}|(?:â€[{_HIGH}])+")
CHINESE = re.compile(f"[{HAN}\u2010-\u2027\u3000-\u303f\ufeff-\uffef\U0001f000-\U0001ffff]")
LOST = re.compile(
    r"(?:锟斤拷){2,}锟?|(?:烫烫|屯屯){3,}|\ufffd+[\u0300-\u036f]*|[\ue000-\uf8ff\U000f0000-\U0010ffff][\u0300-\u036f]*"
)
# Private-use characters that are Chinese: those of older GBK fonts, which GB18030 has given a place.
_OF_GBK = (bytes([0xFE, byte]).decode("gb18030") for byte in range(0x50, 0xA1) if byte != 0x7F)
FORMERLY_PRIVATE = {
    chr(0xE815 + i): char for i, char in enumerate(_OF_GBK) if not "\ue000" <= char <= "\uf8ff"
}


def repair_mojibake(text: str) -> str:
    """UTF-8 read as Windows-1252 becomes what it was, if that is Chinese. What is lost for good goes: U+FFFD, its
    double error 锟斤拷锟斤拷, and private-use characters, which mean something in one font only; between Han one stands
    for a character, and □ takes its place."""
    if re.search("[âã-éïð]", text):
        text = MISREAD.sub(_reread, text)
    return LOST.sub(_replacement, text)


def _replacement(lost: re.Match) -> str:
    if lost[0][0] in FORMERLY_PRIVATE:
        return FORMERLY_PRIVATE[lost[0][0]] + lost[0][1:]
    around = (
        lost.string[max(lost.start() - 1, 0) : lost.start()]
        + lost.string[lost.end() : lost.end() + 1]
    )
    return (
        "□"
        if lost[0] >= "\ue000" and lost[0][0] != "\ufffd" and re.fullmatch(f"[{HAN}]{{2}}", around)
        else ""
    )


def _reread(match: re.Match) -> str:
    try:
        read = bytes(_CP1252.get(char, ord(char)) for char in match[0]).decode()
    except UnicodeDecodeError:
        return match[0]
    return read if CHINESE.search(read) else match[0]


TAG_NAMES = "p|br|div|span|a|b|i|u|em|strong|h[1-6]|ul|ol|li|table|tbody|thead|tr|td|th|img|font|center|hr|sup|sub|blockquote"
# Attributes need a value: `a <b and c> d` is no tag.
TAG = re.compile(
    rf"""<(/?)({TAG_NAMES})((?:\s+[\w:-]+\s*=\s*(?:"[^"<>]*"|'[^'<>]*'|[^\s"'<>]+))*)\s*/?>""", re.I
)
INVISIBLE_HTML = re.compile(r"<!--.*?-->|<(script|style)\b[^<>]*>.*?</\1\s*>", re.S | re.I)
# Only the names of HTML 4, and with `;`: code has `&num;`, URLs `?a=1&copy=2`.
ENTITY = re.compile(
    rf"&(?:#\d{{1,7}}|#[xX][0-9a-fA-F]{{1,6}}|apos|{'|'.join(sorted(name2codepoint))});"
)
BREAKING = frozenset(["p", "br", "div", "li", "tr", "h1", "h2", "h3", "h4", "h5", "h6", "hr"])
RAISED = {
    "sup": str.maketrans("0123456789+-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻"),
    "sub": str.maketrans("0123456789+-", "₀₁₂₃₄₅₆₇₈₉₊₋"),
}
SUPERSCRIPT = re.compile(r"<(sup|sub)>([0-9+-]{1,8})</\1>", re.I)


def strip_html(text: str) -> str:
    """Entities become characters, to the bottom of `&amp;lt;`; comments, scripts and well-known tags go. Markdown code
    stays, and so does any other `<...>`: it is code or mathematics."""
    return outside_code(_strip_html, text) if "&" in text or "<" in text else text


def _strip_html(text: str) -> str:
    before = None
    while text != before:  # each replacement shortens the text
        before = text
        text = ENTITY.sub(
            lambda m: html.unescape(m[0]), INVISIBLE_HTML.sub("", text) if ">" in text else text
        )
    text = SUPERSCRIPT.sub(lambda m: m[2].translate(RAISED[m[1].lower()]), text)
    # A line break in a row of a Markdown table must not break the row.
    text = re.sub(
        r"^\|.*<br.*$", lambda row: re.sub(r"(?i)<br\s*/?>", " ", row[0]), text, flags=re.M | re.I
    )
    closed = set(re.findall(r"</(\w+)>", text))
    return TAG.sub(partial(_without_tag, text, closed), text)


def _without_tag(text: str, closed: set[str], tag: re.Match) -> str:
    name = tag[2].lower()
    if tag[1]:
        return "\n" if name in BREAKING else " " if name in ("td", "th") else ""
    around = text[max(tag.start() - 1, 0) : tag.start()] + text[tag.end() : tag.end() + 1]
    if around in ('""', "''", "“”", "‘’", "()", "（）"):
        return tag[0]  # it is spoken of
    behind_word = (
        tag.start() > 0 and text[tag.start() - 1].isascii() and (text[tag.start() - 1].isalnum())
    )
    if behind_word and name not in BREAKING and tag[2] not in closed:
        return tag[0]  # List<Font> is code
    return "\n" if name in BREAKING else ""


# Controls but \t and \n; zero-width and directional marks, fillers; half surrogate pairs; U+200D, but not among emoji.
INVISIBLE = re.compile(
    r"[\ud800-\udfff\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u061c\u115f\u1160\u180e\u200b\u200c\u200e\u200f"
    rf"\u202a-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff9-\ufffb\ufffe\uffff][\u0300-\u036f]*"
    rf"|(?<=[{HAN}])\u200d|\u200d(?=[{HAN}])"
)


def drop_invisible(text: str) -> str:
    """Remove characters one cannot see, with accents on them; every kind of line break becomes \\n."""
    return INVISIBLE.sub("", re.sub(r"\r\n?|\x0b|\x0c|\x85|\u2028|\u2029", "\n", text))


# NFKC would make most of these ASCII (，->, …->...), lose a power, an index or a unit (m² -> m2, ㎡ -> m2, ② -> 2), run
# a fraction into the number before it (5½ -> 51⁄2), or tear a lone accent, a double prime or a Korean letter apart.
KEPT_BY_NFKC = re.compile(
    r"[，。？！：；（）…～￣‾‗²³¹⁰-₟¼-¾⅐-⅟↉″‴⁗ªº´¨¯¸˘-˝˙゛゜｀℃℉™℠①-⓿㈀-㋿㌀-㏿ㄱ-ㅣㅥ-ㆎ]+"
)


@cache
def _changed_by_nfkc() -> re.Pattern:
    """What NFKC would change below U+10000, alone or as a mark on the letter before it."""
    chars = [chr(code) for code in range(0x80, 0x10000) if not 0xAC00 <= code <= 0xDFFF]
    changed = [
        c for c in chars if not unicodedata.is_normalized("NFKC", c) or unicodedata.combining(c)
    ]
    jamo = "\u1161-\u1175\u11a8-\u11c2"  # vowels and finals join the syllable before them
    return re.compile(f"[{''.join(c for c in changed if not KEPT_BY_NFKC.match(c))}{jamo}]")


def nfkc(text: str) -> str:
    """Unicode NFKC (full-width letters and digits become ordinary ones), Chinese punctuation and units excepted."""
    if not text or (max(text) < ASTRAL and not _changed_by_nfkc().search(text)):
        return text
    text = text.replace(
        "︰", "："
    )  # the colon of vertical writing, common in Taiwan; NFKC makes it two dots
    text = text.replace("－－", "——").replace("\u2011", "-")
    text = re.sub(rf"＜(?=[{HAN}])([^＜＞\n]*)＞", r"〈\1〉", text)
    if text.count("．") > text.count(
        "。"
    ):  # a full stop there, as in mathematics; else it stands in names
        text = re.sub(rf"(?<=[{HAN}）])．", "。", text)
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
    han = [
        chr(code)
        for code in (*range(0x3400, 0x4DC0), *range(0x4E00, 0xA000), *range(0xF900, 0xFB00))
    ]
    changed = [a for a, b in zip(han, convert("\n".join(han)).split("\n"), strict=True) if a != b]
    return convert, re.compile(f"[{''.join(changed)}]")


# OpenCC makes 薴 苧, and that 苎, another plant, the next time.
NOT_TWICE = "薴"
KANA = re.compile("[\u3041-\u30ff]")


def simplify(text: str, config: str = "t2s") -> str:
    """Traditional -> simplified characters by OpenCC's phrase tables; tw2s and hk2s know Taiwan's and Hong Kong's."""
    convert, traditional = _opencc(config)
    if not text or (max(text) < ASTRAL and not traditional.search(text)):
        return text
    if len(text) > 100 and len(traditional.findall(text)) < len(text) / 100:
        return text  # simplified text with a few names and old words, which conversion would rather spoil: 乾元, 凌濛初
    if KANA.search(text):  # Japanese stays: 東京の大学
        lines = text.split("\n")
        return "\n".join(
            line if len(KANA.findall(line)) * 4 > len(line) else _simplify(line, convert)
            for line in lines
        )
    return _simplify(text, convert)


def _simplify(text: str, convert: Callable[[str], str]) -> str:
    converted = NOT_TWICE.join(convert(part) for part in text.split(NOT_TWICE))
    if max(converted, default="") >= ASTRAL and len(converted) == len(
        text
    ):  # 爇 would become 𦶟, which nobody types
        return "".join(
            old if new >= ASTRAL else new for old, new in zip(text, converted, strict=True)
        )
    return converted


# Not `.` (1.000, ...), not + - * = # / (C++, --, ==); ASCII ! or ? only after Han, or three behind a word: `!!x` is
# code, and a line may begin with `???` or `!!!` as Markdown.
REPEATED = re.compile(
    rf"([，。？！：；、～])\1+|(…)…{{2,}}|(—)—{{2,}}|(?<=[{HAN}])([!?])\4+|(?<=\w)([!?])\5{{2,}}"
)


def collapse_repeated(text: str) -> str:
    """`。。。。` -> `。`, `!!!!` -> `!`; the ellipsis `……` and the dash `——` are two characters each and stay so."""

    def once(match: re.Match) -> str:
        return match[2] * 2 if match[2] else match[3] * 2 if match[3] else match[0][0]

    return outside_code(partial(REPEATED.sub, once), text)


def tidy_space(text: str) -> str:
    """Trim the text and its lines' ends, at most one blank line, no indentation by other spaces than code has, nor in
    front of Han throughout; one space at most between Han."""
    parts = FENCED.split(text) if "```" in text or "~~~" in text else [text]
    text = (
        "".join(part if i % 2 else _tidy_space(part) for i, part in enumerate(parts))
        .lstrip("\n")
        .rstrip()
    )
    if indent := re.match(rf"[^\S\n]+(?=[{HAN}])", text):
        lines = text.split("\n")
        everywhere = all(line.startswith(indent[0]) or not line for line in lines)
        return (
            "\n".join(line.removeprefix(indent[0]) for line in lines)
            if everywhere
            else text[indent.end() :]
        )
    return text


def _tidy_space(text: str) -> str:
    text = re.sub(
        r"(?<![^\S\n])[^\S\n]++$", "", text, flags=re.M
    )  # tried at a run's beginning alone, or it costs n^2
    text = re.sub(
        r"^[ \t]*[^\S\n \t][^\S\n]*(?![\x21-\x7e])", "", text, flags=re.M
    )  # code has it with \xa0 too
    text = re.sub(rf"(?<=[{HAN}，。？！：；])[^\S\n]{{2,}}(?=[{HAN}])", " ", text)
    return re.sub(r"\n{3,}", "\n\n", text)


# ASCII punctuation behind Han and before Han, a quotation mark or the line's end is Chinese; so are brackets around
# what begins with Han. `:` needs Han right behind it, and `.` the end.
_BEHIND, _BEFORE = f"[{HAN}”’）》】」』]", f"[{HAN}“‘（《【「『]"
TO_CHINESE = re.compile(
    rf"(?<={_BEHIND})(?:([,;:]|[?!]{{1,3}}) ?(?={_BEFORE})|([,;:.]|[?!]{{1,3}})(?=[”’」』）]|\n|\Z))"
    rf"|(?<=[{HAN}])\(([{HAN}](?:[^()（）\n]|（[^()（）\n]*）)*)[)）]|（([^()（）\n]*)\)"
)
WIDE = str.maketrans(",;:?!.()", "，；：？！。（）")
NARROW = str.maketrans("，；：？！。（）", ",;:?!.()")


def punctuate(text: str) -> str:
    """Punctuation by context: Chinese between Han, ASCII in a text without any. Code, URLs and indented lines stay."""
    if re.search(f"[{HAN}\u3040-\u30ff]", text):
        return outside_code(
            lambda part: re.sub(r"^(?! {4}|\t).+$", _widen, part, flags=re.M), text, CODE_OR_URL
        )
    return outside_code(_narrow, text, CODE_OR_URL) if re.search("[A-Za-z]", text) else text


def _widen(line: re.Match) -> str:
    return TO_CHINESE.sub(
        lambda m: (
            f"（{m[3] or m[4] or ''}）" if m[0][-1] in ")）" else m[0].strip().translate(WIDE)
        ),
        line[0],
    )


def _narrow(text: str) -> str:
    text = re.sub(r"(?<=[0-9])：(?=[0-9])", ":", text)
    text = re.sub(
        r"(?<=[A-Za-z0-9）])([，。；：？！])(?=[A-Za-z（“‘])",
        lambda m: m[1].translate(NARROW) + " ",
        text,
    )
    text = re.sub(
        r"(?<=[A-Za-z0-9）])[，。；：？！](?=[\s）”’]|\Z)", lambda m: m[0].translate(NARROW), text
    )
    text = re.sub(r"(?<=[A-Za-z0-9,.;:?!])（", " (", text)
    return re.sub(r"）(?=[A-Za-z0-9])", ") ", text).replace("（", "(").replace("）", ")")


NO_SENTENCE = re.compile(  # a heading or list item, a quotation's source, a byline behind a finished sentence
    r"[-—–#*·•【＊★]|\d+[.、）)]|[A-Za-z ]+[:：]|.*★|.*[。！？]”?\s*[（(][^（()）]*[)）]\Z|.*——?\s*《[^《》]*》\Z"
)


def final_punctuation(text: str) -> str:
    """A text that ends in Han, or in closing brackets right after Han, gets its 。; anything else ends as it is. So
    does one whose last line is no sentence: a heading, a source, or one of several lines without punctuation."""
    if not re.search(rf"[{HAN}][”’）》】」』)\]]{{0,3}}\Z", text):
        return text
    *before, last = text.split("\n")
    earlier = next((line for line in reversed(before) if line.strip()), "")
    of_a_sentence = (
        not before or re.search("[，。；！？：、]", last) or earlier.endswith(tuple("，、；："))
    )
    return text + "。" if of_a_sentence and not NO_SENTENCE.match(last) else text


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
