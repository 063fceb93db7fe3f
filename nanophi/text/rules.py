r"""Cleaning rules: named functions str -> str. Each can be read and tested by itself.

`clean.py` applies them in the order of the table RULES, which is the order of this file:

    rule          before                    after
    mojibake      ä½\xa0å¥½                 你好
    html          <p>3 &lt; 5</p>           3 < 5
    invisible     你\u200b好                 你好
    space         \u3000\u3000你好           你好
    nfkc          Ｐｙｔｈｏｎ３             Python3
    simplified    頭髮                      头发
    repeated      好。。。                   好。
    punctuation   你好,世界!                 你好，世界！
    final         今天天气不错               今天天气不错。

What the rules must not do is half of their job: Chinese punctuation, decimals, URLs, code and Latin
words stay as they are. (The rules of the project that nanophi reimplements turned `4.567Ga` into
`4。567Ga` and deleted every letter s that stood twice.) Outside of tags, entities and mojibake,
every ASCII letter and digit of NFKC(text) is still there afterwards, in the same order.

No rule may need time that grows with the square of the text's length: see the comments on
TRAILING_SPACE and `_drop_hidden`. JOINTS, at the end, ends texts that are built to keep the rules
busy for ever, one layer in another.
"""

import html
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from html.entities import name2codepoint
from itertools import groupby

Rule = Callable[[str], str]

# ---- 0. what several rules share: Han, and where code is

# The inside of a character class: Extension A, the common Han characters, compatibility
# characters, the rare ones of planes 2 and 3, and the zero 〇.
HAN = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff〇"
# The first code point beyond the Basic Multilingual Plane. `re` tests a class of characters below
# it in one step, with a bit map. From it on, `re` looks through the class one range after another.
ASTRAL = "\U00010000"
# Accents that stand on the character before them; they go where that character goes.
_ACCENTS = r"[\u0300-\u036f]*"

# Markdown's code. A fence that nobody closes reaches to the end of the text.
_FENCE = "(?:```|~~~)"
_FENCED = rf"(?:^[^\S\n]*){_FENCE}.*?(?:^[^\S\n]*{_FENCE}|\Z)"
_INLINE = r"`[^`\n]+`"
_URL = r"https?://[^\s，。；！？（）《》“”‘’]+"
# Each of these patterns has one group around everything, because `outside_code` splits by it.
FENCED = re.compile(f"({_FENCED})", re.S | re.M)
CODE = re.compile(f"({_FENCED}|{_INLINE})", re.S | re.M)
CODE_OR_URL = re.compile(f"({_FENCED}|{_INLINE}|{_URL})", re.S | re.M)


def outside_code(rule: Rule, text: str, code: re.Pattern = CODE) -> str:
    """Apply the rule to everything that `code` does not match.

    A pattern with one group splits a text into text and code in turns; the code has odd indices:

    >>> CODE.split("甲,`乙,丙`,丁")
    ['甲,', '`乙,丙`', ',丁']
    >>> outside_code(lambda part: part.replace(",", "，"), "甲,`乙,丙`,丁")
    '甲，`乙,丙`，丁'
    """
    if "`" not in text and "~~~" not in text and (code is CODE or "://" not in text):
        return rule(text)  # most texts hold no code
    parts = code.split(text)
    parts[::2] = [rule(part) for part in parts[::2]]
    return "".join(parts)


# ---- 1. mojibake: bytes that were decoded with the wrong table
#
# The UTF-8 bytes of 你 are E4 BD A0. Read as Windows-1252 or Latin-1, they are the three characters
# ä ½ \xa0. So a misread character is a first byte that tells how many bytes follow, and then
# characters of the continuation bytes 80 to BF. A Chinese character begins with the byte E3 to E9
# (ã to é), Chinese punctuation with E2 (â) or EF (ï), rare characters and emoji with F0 (ð).

_NOT_IN_CP1252 = (0x81, 0x8D, 0x8F, 0x90, 0x9D)  # bytes that Windows-1252 leaves undefined
_CP1252 = {bytes([b]).decode("cp1252"): b for b in range(256) if b not in _NOT_IN_CP1252}
# The characters of the bytes 80 to BF in Windows-1252, and 80 to 9F as Latin-1 reads them.
_CONTINUATION = (
    re.escape("".join(char for char, byte in _CP1252.items() if 0x80 <= byte < 0xC0)) + "\x80-\x9f"
)
_MISREAD_CHAR = f"(?:[âã-éï][{_CONTINUATION}]{{2}}|ð[{_CONTINUATION}]{{3}})"
MISREAD = re.compile(
    # Any number of them, but not right after a letter: the end of `café…”` looks like one too.
    f"(?<![A-Za-z]){_MISREAD_CHAR}+"
    # Two or more of them are safe after a letter: Pythonå¾ˆå¥½ is Python很好.
    f"|{_MISREAD_CHAR}{{2,}}"
    # So is punctuation (bytes E2 80 xx): Donâ€™t is Don’t.
    f"|(?:â€[{_CONTINUATION}])+"
)
# The reading with the right table must hold one of these; otherwise the text stays as it was.
CHINESE = re.compile(f"[{HAN}\u2010-\u2027\u3000-\u303f\ufeff-\uffef\U0001f000-\U0001ffff]")

# What cannot be repaired, because the bytes are gone.
LOST = re.compile(
    r"(?:锟斤拷){2,}锟?"  # U+FFFD twice, written as UTF-8 and read as GBK
    r"|(?:烫烫|屯屯){3,}"  # memory that a debugger filled with CC or CD, read as GBK
    rf"|\ufffd+{_ACCENTS}"  # the replacement character
    rf"|[\ue000-\uf8ff\U000f0000-\U0010ffff]{_ACCENTS}"  # private use: one font's own signs
)
# Private-use characters that are Chinese: older GBK fonts used U+E815 and the following code points
# for characters to which GB18030 has since given a place.
_NOW_IN_GB18030 = [
    bytes([0xFE, byte]).decode("gb18030") for byte in range(0x50, 0xA1) if byte != 0x7F
]
FORMERLY_PRIVATE = {
    chr(0xE815 + i): char
    for i, char in enumerate(_NOW_IN_GB18030)
    if not "\ue000" <= char <= "\uf8ff"
}
_TWO_HAN = re.compile(f"[{HAN}]{{2}}")


def repair_mojibake(text: str) -> str:
    r"""UTF-8 that was read as Windows-1252 becomes what it was, if that is Chinese.

    >>> repair_mojibake("ä½\xa0å¥½，ä¸–ç•Œ")
    '你好，世界'
    >>> repair_mojibake("“Allons au café…” dit-elle.")  # French, and no mojibake
    '“Allons au café…” dit-elle.'

    What is lost for good is removed: U+FFFD, its double error 锟斤拷锟斤拷, and private-use
    characters, which mean something in one font only.

    >>> repair_mojibake("锟斤拷锟斤拷后面是\ufffd正文")
    '后面是正文'

    A private-use character between two Han characters stands for a third one, and □ takes its
    place.

    >>> repair_mojibake("图\ue5d2标")
    '图□标'
    """
    if re.search("[âã-éïð]", text):
        text = MISREAD.sub(_reread, text)
    return LOST.sub(_replacement, text)


def _reread(misread: re.Match) -> str:
    """The characters, back to bytes and decoded as UTF-8; unchanged where that gives no Chinese."""
    try:
        read = bytes(_CP1252.get(char, ord(char)) for char in misread[0]).decode()
    except UnicodeDecodeError:
        return misread[0]
    return read if CHINESE.search(read) else misread[0]


def _replacement(lost: re.Match) -> str:
    """What takes the place of a match of LOST: a character of GB18030, □, or nothing."""
    first = lost[0][0]
    if first in FORMERLY_PRIVATE:
        return FORMERLY_PRIVATE[first] + lost[0][1:]
    before = lost.string[max(lost.start() - 1, 0) : lost.start()]
    after = lost.string[lost.end() : lost.end() + 1]
    is_private = first >= "\ue000" and first != "\ufffd"
    if is_private and _TWO_HAN.fullmatch(before + after):
        return "□"
    return ""


# ---- 2. html: tags, entities, comments and scripts

TAG_NAMES = (
    "p|br|div|span|a|b|i|u|em|strong|h[1-6]|ul|ol|li|table|tbody|thead|tr|td|th|img|font|center|hr"
    "|sup|sub|blockquote"
)
# An attribute needs a value: `a <b and c> d` holds no tag.
_ATTRIBUTE = r"""\s+[\w:-]+\s*=\s*(?:"[^"<>]*"|'[^'<>]*'|[^\s"'<>]+)"""
# Groups: 1 the slash of a closing tag, 2 the name, 3 the attributes.
TAG = re.compile(rf"<(/?)({TAG_NAMES})((?:{_ATTRIBUTE})*)\s*/?>", re.I)
# The beginnings of what no reader sees, and how each kind of it ends.
HIDDEN = re.compile(r"<(?:(!--)|(script|style)\b[^<>]*>)", re.I)
END_OF_HIDDEN = {
    "!--": re.compile(r"-->"),
    "script": re.compile(r"</script\s*>", re.I),
    "style": re.compile(r"</style\s*>", re.I),
}
# Only names of HTML 4, and only with `;`: code holds `&num;`, URLs hold `?a=1&copy=2`. Text that
# was escaped again and again, `&amp;amp;amp;lt;`, is one match. Group 1 is the last part, `lt;`.
_ENTITY_NAMES = "|".join(sorted(name2codepoint))
_AMPERSAND = "(?:amp|#0{0,5}38|#[xX]0{0,4}26);"
ENTITY = re.compile(
    rf"&(?:{_AMPERSAND})*((?:#\d{{1,7}}|#[xX][0-9a-fA-F]{{1,6}}|apos|{_ENTITY_NAMES});)"
)
DECODED = 4  # how often entities are decoded at most; text that was escaped twice needs two
# Tags that begin or end a line, and the cells of a table, which a space separates.
BREAKING = frozenset(["p", "br", "div", "li", "tr", "h1", "h2", "h3", "h4", "h5", "h6", "hr"])
CELLS = frozenset(["td", "th"])
SUPERSCRIPT = re.compile(r"<(sup|sub)>([0-9+-]{1,8})</\1>", re.I)
RAISED = {
    "sup": str.maketrans("0123456789+-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻"),
    "sub": str.maketrans("0123456789+-", "₀₁₂₃₄₅₆₇₈₉₊₋"),
}
_ROW_WITH_BREAK = re.compile(r"^\|.*<br.*$", re.M | re.I)  # a row of a Markdown table
_BREAK = re.compile(r"<br\s*/?>", re.I)


def strip_html(text: str) -> str:
    r"""Entities become characters; comments, scripts and well-known tags go.

    >>> strip_html("<div class='a'>3 &amp;lt; 5<br>10<sup>8</sup></div>")
    '\n3 < 5\n10⁸\n'

    Markdown's code stays, and so does any other `<...>`: it is code or mathematics.

    >>> strip_html("`<b>`, List<String>, a<b && c>d")
    '`<b>`, List<String>, a<b && c>d'
    """
    if "&" not in text and "<" not in text:
        return text
    return outside_code(_strip_html, text)


def _strip_html(text: str) -> str:
    text = _decode_entities(text)
    text = SUPERSCRIPT.sub(lambda match: match[2].translate(RAISED[match[1].lower()]), text)
    # A line break in a row of a Markdown table must not break the row.
    text = _ROW_WITH_BREAK.sub(lambda row: _BREAK.sub(" ", row[0]), text)
    closed = set(re.findall(r"</(\w+)>", text))
    return TAG.sub(partial(_without_tag, text, closed), text)


def _decode_entities(text: str) -> str:
    """Decode entities, and remove comments and scripts, until nothing changes, or DECODED times.

    >>> _decode_entities("3 &amp;amp;lt; 5")
    '3 < 5'
    """
    for _ in range(DECODED):
        before = text
        if ">" in text:
            text = _drop_hidden(text)
        text = ENTITY.sub(lambda entity: html.unescape("&" + entity[1]), text)
        if text == before:
            break
    return text


def _drop_hidden(text: str) -> str:
    """Remove comments, scripts and styles. What nobody closes stays.

    >>> _drop_hidden("甲<!-- 乙 -->丙<script>丁</script>戊<!-- 己")
    '甲丙戊<!-- 己'

    A kind that has no end in the rest of the text is not looked for again. One pattern for a whole
    comment would look through all the rest at each of these beginnings, n * n / 2 characters:

        <!--      <!--      <!--      <!--
        ├─────────────────────────────────> no end: it stays, and so do
                  the other three, without a search
    """
    parts = []
    done = 0  # characters of the text
    unclosed = set()
    for beginning in HIDDEN.finditer(text):
        kind = (beginning[1] or beginning[2]).lower()
        if beginning.start() < done or kind in unclosed:
            continue
        end = END_OF_HIDDEN[kind].search(text, beginning.end())
        if end is None:
            unclosed.add(kind)
        else:
            parts.append(text[done : beginning.start()])
            done = end.end()
    parts.append(text[done:])
    return "".join(parts)


def _without_tag(text: str, closed: set[str], tag: re.Match) -> str:
    """What takes the place of a tag: a line break, a space, nothing, or the tag itself.

    closed: the names of all closing tags in the text
    """
    name = tag[2].lower()
    is_closing = tag[1] == "/"
    if not is_closing and (_is_quoted(text, tag) or _is_code(text, closed, tag)):
        return tag[0]
    if name in BREAKING:
        return "\n"
    if name in CELLS and is_closing:
        return " "
    return ""


def _is_quoted(text: str, tag: re.Match) -> bool:
    """Whether the tag stands in quotation marks or brackets: then the text is about the tag."""
    around = text[max(tag.start() - 1, 0) : tag.start()] + text[tag.end() : tag.end() + 1]
    return around in ('""', "''", "“”", "‘’", "()", "（）")


def _is_code(text: str, closed: set[str], tag: re.Match) -> bool:
    """Whether the tag follows a word at once and is never closed: `List<Font>` is code."""
    before = text[max(tag.start() - 1, 0) : tag.start()]
    behind_word = before.isascii() and before.isalnum()
    return behind_word and tag[2].lower() not in BREAKING and tag[2] not in closed


# ---- 3. invisible: characters that nobody can see

INVISIBLE = re.compile(
    r"["
    r"\ud800-\udfff"  # halves of surrogate pairs
    r"\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f"  # controls, except \t, \n, \r and \x85
    r"\u00ad"  # the soft hyphen
    r"\u061c"  # a directional mark
    r"\u115f\u1160"  # Korean fillers
    r"\u180e\u200b\u200c"  # zero-width separators
    r"\u200e\u200f\u202a-\u202e"  # directional marks
    r"\u2060-\u206f"  # word joiner, invisible operators, directional isolates
    r"\u3164"  # a Korean filler
    r"\ufeff"  # the byte order mark
    r"\uffa0"  # a Korean filler
    r"\ufff9-\ufffb"  # annotation marks
    r"\ufffe\uffff"  # no characters
    rf"]{_ACCENTS}"
    # Zero-width joiners go beside Han; they stay among emoji, which they join: 👩‍🚀. The second
    # lookbehind has the reason that TRAILING_SPACE explains.
    rf"|(?<=[{HAN}])\u200d+|(?<!\u200d)\u200d++(?=[{HAN}])"
)
LINE_BREAK = re.compile(r"\r\n?|\x0b|\x0c|\x85|\u2028|\u2029")


def drop_invisible(text: str) -> str:
    r"""Remove characters that nobody can see, with the accents on them; every kind of line break
    becomes \n.

    >>> drop_invisible("\ufeff你\u200b好\r\n世\xad界")
    '你好\n世界'
    """
    return INVISIBLE.sub("", LINE_BREAK.sub("\n", text))


# ---- 4. space: indentation, gaps, blank lines
#
# `[^\S\n]` is any white space but the line break.

# The lookbehind lets a match begin at the beginning of a run only. Without it, `re` would try again
# from each place of a run that ends in no line break, and a run of n spaces would cost n^2.
TRAILING_SPACE = re.compile(r"(?<![^\S\n])[^\S\n]++$", re.M)
# Indentation that holds another space than ' ' and '\t', such as U+3000, unless an ASCII character
# follows: code may be indented with \xa0.
PROSE_INDENT = re.compile(r"^[ \t]*[^\S\n \t][^\S\n]*(?![\x21-\x7e])", re.M)
GAP_IN_HAN = re.compile(rf"(?<=[{HAN}，。？！：；])[^\S\n]{{2,}}(?=[{HAN}])")
BLANK_LINES = re.compile(r"\n{3,}")
_INDENT_OF_HAN = re.compile(rf"[^\S\n]+(?=[{HAN}])")


def tidy_space(text: str) -> str:
    r"""Trim the text and the ends of its lines; leave at most one blank line between lines and at
    most one space between Han; remove indentation by spaces that code does not use.

    >>> tidy_space("\u3000\u3000第一段。  \n\n\n\n\u3000\u3000第二   段。\n")
    '第一段。\n\n第二 段。'

    Indentation of all lines goes too if the first begins with Han. That of code stays.

    >>> tidy_space("    春眠不觉晓，\n    处处闻啼鸟。")
    '春眠不觉晓，\n处处闻啼鸟。'
    >>> tidy_space("class A:\n    x = 1")
    'class A:\n    x = 1'
    """
    if "```" in text or "~~~" in text:
        text = outside_code(_tidy_lines, text, FENCED)
    else:
        text = _tidy_lines(text)
    text = text.lstrip("\n").rstrip()
    indent = _INDENT_OF_HAN.match(text)
    if indent is None:
        return text
    lines = text.split("\n")
    if all(line.startswith(indent[0]) or not line for line in lines):
        return "\n".join(line.removeprefix(indent[0]) for line in lines)
    return text[indent.end() :]


def _tidy_lines(text: str) -> str:
    text = TRAILING_SPACE.sub("", text)
    text = PROSE_INDENT.sub("", text)
    text = GAP_IN_HAN.sub(" ", text)
    return BLANK_LINES.sub("\n\n", text)


# ---- 5. nfkc: one form for each character

# Runs of characters that NFKC would spoil.
KEPT_BY_NFKC = re.compile(
    r"["
    r"，。？！：；（）…～"  # Chinese punctuation: ， -> ,   … -> ...
    r"￣‾‗"  # lines above and below: a space and a combining mark
    r"²³¹⁰-₟"  # powers and indices: m² -> m2
    r"¼-¾⅐-⅟↉"  # fractions, which would run into the number before them: 5½ -> 51⁄2
    r"″‴⁗"  # double and triple primes, which would fall apart
    r"ªº"  # ordinals
    r"´¨¯¸˘-˝˙゛゜｀"  # lone accents: a space and a combining accent
    r"℃℉™℠"  # signs: ℃ -> °C
    r"①-⓿㈀-㋿㌀-㏿"  # enclosed and squared signs: ② -> 2   ㎡ -> m2
    r"ㄱ-ㅣㅥ-ㆎ"  # Korean letters, which would join others
    r"]+"
)
# NFKC sorts the accents on a letter in a time that grows with the square of their number. A run of
# so many signs may be such accents, which then come to it in order.
_MANY_SIGNS = re.compile(r"(?<![^\w\s])[^\w\s]{64,}")
_BRACKETS_AROUND_HAN = re.compile(rf"＜(?=[{HAN}])([^＜＞\n]*)＞")
_STOP_BEHIND_HAN = re.compile(rf"(?<=[{HAN}）])．")


@cache
def _changed_by_nfkc() -> re.Pattern:
    """What NFKC would change below U+10000, alone or as a mark on the letter before it."""
    chars = [chr(code) for code in range(0x80, 0x10000) if not 0xAC00 <= code <= 0xDFFF]
    changed = [
        char
        for char in chars
        if not unicodedata.is_normalized("NFKC", char) or unicodedata.combining(char)
    ]
    jamo = "\u1161-\u1175\u11a8-\u11c2"  # Korean vowels and finals join the syllable before them
    return re.compile(
        f"[{''.join(char for char in changed if not KEPT_BY_NFKC.match(char))}{jamo}]"
    )


def nfkc(text: str) -> str:
    """Unicode NFKC (full-width letters and digits become ordinary ones), except for Chinese
    punctuation, powers, fractions and units.

    >>> nfkc("Ｐｙｔｈｏｎ３．１０，面积１００㎡，５m²")
    'Python3.10，面积100㎡，5m²'
    """
    if not text or (max(text) < ASTRAL and not _changed_by_nfkc().search(text)):
        return text  # most texts need no change, and this test is fast
    text = _MANY_SIGNS.sub(_with_accents_in_order, _before_nfkc(text))
    parts = []
    end = 0  # of the run of kept characters before this one
    for kept in KEPT_BY_NFKC.finditer(text):
        parts.append(unicodedata.normalize("NFKC", text[end : kept.start()]))
        parts.append(kept[0])
        end = kept.end()
    parts.append(unicodedata.normalize("NFKC", text[end:]))
    return "".join(parts)


def _before_nfkc(text: str) -> str:
    """Replace what NFKC would turn into something else than a Chinese reader means.

    >>> _before_nfkc("時間︰三點－－證畢．《書》在＜附錄＞")
    '時間：三點——證畢。《書》在〈附錄〉'
    """
    # The colon of vertical writing is common in Taiwan; NFKC would make it two dots.
    text = text.replace("︰", "：")
    text = text.replace("－－", "——").replace("\u2011", "-")
    text = _BRACKETS_AROUND_HAN.sub(r"〈\1〉", text)
    # A text with more ．than 。 ends its sentences with ．, as mathematics does. In any other text
    # it stands in names.
    if text.count("．") > text.count("。"):
        text = _STOP_BEHIND_HAN.sub("。", text)
    return text


def _with_accents_in_order(run: re.Match) -> str:
    """A run of signs with the accents on each letter in the order of NFKC: by their class, a number
    that says where an accent stands.
    """
    decomposed = "".join(unicodedata.normalize("NFD", char) for char in run[0])
    parts: list[str] = []
    for are_accents, signs in groupby(decomposed, lambda sign: unicodedata.combining(sign) > 0):
        run_of_signs = list(signs)
        if are_accents:
            run_of_signs.sort(key=unicodedata.combining)  # a stable sort, as NFKC's order is
        parts += run_of_signs
    return "".join(parts)


# ---- 6. simplified: traditional characters become simplified ones

# OpenCC makes 苧 of 薴, and the next time 苎 of that, which is another plant.
NOT_TWICE = "薴"
KANA = re.compile("[\u3041-\u30ff]")


# Traditional characters that are simplified ones too, in other words: 乾隆, 瞭望, 慰藉, 宫商角徵羽.
BOTH = "乾瞭藉餘徵摺夥拚吒咤捱噁薹袷麴昇陞甯"
_SENTENCE = re.compile(r"[^。！？\n]+[。！？\n]*|[。！？\n]+")
# 著 as in 看著, which is 看着 in simplified text, and not as in 著名 or 名著. This knows the common
# words; it reads 看著作業 as 著作, and a name such as 沈著 as 看著. A work's author stands before
# its title, or before the end of a line.
ASPECT = re.compile(
    "(?<![名显卓土原合遗译论巨编专昭彰拙所知较])著(?![名作者述录称]|书立|有?[《〈「『]|[）)\n]|\\Z)"
)


@dataclass(frozen=True)
class Script:
    """How OpenCC converts, and the characters below U+10000 by which one knows a text."""

    convert: Rule
    traditional: re.Pattern  # characters that are only traditional
    simplified: re.Pattern  # characters that are only simplified


@cache
def _opencc(config: str) -> Script:
    import opencc

    convert = opencc.OpenCC(config).convert
    blocks = (range(0x3400, 0x4DC0), range(0x4E00, 0xA000), range(0xF900, 0xFB00))
    han = [chr(code) for block in blocks for code in block]
    converted = convert("\n".join(han)).split("\n")
    pairs = [(old, new) for old, new in zip(han, converted, strict=True) if old != new]
    traditional = {old for old, _ in pairs} - set(BOTH)
    simplified = {new for _, new in pairs if not _is_in_big5(new)} - traditional
    return Script(
        convert,
        re.compile(f"[{''.join(sorted(traditional))}]"),
        re.compile(f"[{''.join(sorted(char for char in simplified if char < ASTRAL))}]"),
    )


def _is_in_big5(char: str) -> bool:
    """Whether Big5 has the character, the traditional set: 后 and 里 are in both scripts."""
    try:
        char.encode("big5")
    except UnicodeEncodeError:
        return False
    return True


def simplify(text: str, config: str = "t2s") -> str:
    r"""Traditional -> simplified characters by OpenCC's tables, which know phrases.

    config: t2s; tw2s and hk2s also know the characters of Taiwan and of Hong Kong

    >>> simplify("她的頭髮很長，公司發展很快，乾隆喜歡乾燥。")
    '她的头发很长，公司发展很快，乾隆喜欢干燥。'

    Simplified text has 乾 and 著 too, in other words. So those change only where the text shows
    that it is traditional; a text of both kinds is read sentence by sentence.

    >>> simplify("北京故宫的乾清宫。他著急地寫一部著作。")
    '北京故宫的乾清宫。他着急地写一部著作。'

    Japanese lines stay as they are.

    >>> simplify("東京の大学で学ぶ\n東京很遠")
    '東京の大学で学ぶ\n东京很远'
    """
    script = _opencc(config)
    # The first test is fast, and most texts hold no traditional character.
    if not script.traditional.search(text):
        return text
    if len(text) > 100 and len(script.traditional.findall(text)) < len(text) / 100:
        # This is simplified text with a few names and old words, which conversion would spoil:
        # 凌濛初.
        return text
    if not KANA.search(text):
        return _simplify(text, script)
    lines = text.split("\n")
    return "\n".join(line if _is_japanese(line) else _simplify(line, script) for line in lines)


def _is_japanese(line: str) -> bool:
    """Whether more than a quarter of the characters are kana."""
    return len(KANA.findall(line)) * 4 > len(line)


def _simplify(text: str, script: Script) -> str:
    """The text, or of a text of both kinds the sentences that hold a traditional character."""
    if not script.simplified.search(text):
        return _convert(text, script, keep="")
    parts = []
    for sentence in _SENTENCE.findall(text):
        if script.traditional.search(sentence):
            keep = BOTH + "著" if script.simplified.search(sentence) else ""
            sentence = _convert(sentence, script, keep)
        parts.append(sentence)
    return "".join(parts)


def _convert(text: str, script: Script, keep: str) -> str:
    """Convert all characters but those of `keep`."""
    converted = NOT_TWICE.join(script.convert(part) for part in text.split(NOT_TWICE))
    if "著" in converted and "着" not in text and "著" not in keep:
        converted = ASPECT.sub("着", converted)
    if len(converted) != len(text):
        return converted
    # 爇 would become 𦶟, which nobody types: such a character stays traditional.
    if keep or max(converted, default="") >= ASTRAL:
        pairs = zip(text, converted, strict=True)
        return "".join(old if new >= ASTRAL or old in keep else new for old, new in pairs)
    return converted


# ---- 7. repeated: punctuation that stands several times

# Not `.` (1.000, ...), and not + - * = # / (C++, --, ==).
REPEATED = re.compile(
    r"([，。？！：；、～])\1+"
    r"|(…)…{2,}"
    r"|(—)—{2,}"
    # ASCII ! and ? twice after Han, or three times after a word: `!!x` is code, and a line may
    # begin with `???` or `!!!` as Markdown.
    rf"|(?<=[{HAN}])([!?])\4+"
    r"|(?<=\w)([!?])\5{2,}"
)


def collapse_repeated(text: str) -> str:
    """Repeated punctuation stands once; the ellipsis and the dash are two characters and stay so.

    >>> collapse_repeated("好。。。真的吗???嗯…………走了———回来了")
    '好。真的吗?嗯……走了——回来了'
    >>> collapse_repeated("等等... `!!!!` C++")
    '等等... `!!!!` C++'
    """
    return outside_code(_collapse, text)


def _collapse(text: str) -> str:
    return REPEATED.sub(_once, text)


def _once(run: re.Match) -> str:
    is_ellipsis_or_dash = run[0][0] in "…—"
    return run[0][:2] if is_ellipsis_or_dash else run[0][0]


# ---- 8. punctuation: by context

_BEHIND = f"[{HAN}”’）》】」』]"
_BEFORE = f"[{HAN}“‘（《【「『]"
TO_CHINESE = re.compile(
    # ASCII punctuation after Han is Chinese ...
    rf"(?<={_BEHIND})(?:"
    # ... if Han follows at once or after a space, but not so for `.`: 图.png, 打开.文件
    rf"([,;:]|[?!]{{1,3}}) ?(?={_BEFORE})"
    # ... or if a closing quotation mark or bracket follows, or the end of the line or text.
    r"|([,;:.]|[?!]{1,3})(?=[”’」』）]|\n|\Z)"
    r")"
    # Brackets after Han around what begins with Han; inside of it another pair may stand.
    rf"|(?<=[{HAN}])\(([{HAN}](?:[^()（）\n]|（[^()（）\n]*）)*)[)）]"
    # A Chinese bracket that an ASCII one closes.
    r"|（([^()（）\n]*)\)"
)
WIDE = str.maketrans(",;:?!.()", "，；：？！。（）")
NARROW = str.maketrans("，；：？！。（）", ",;:?!.()")
_HAN_OR_KANA = re.compile(f"[{HAN}\u3040-\u30ff]")
_LINE_NOT_INDENTED = re.compile(r"^(?! {4}|\t).+$", re.M)  # four spaces or a tab mark code

# The same for texts without Han and kana.
_COLON_IN_NUMBERS = re.compile(r"(?<=[0-9])：(?=[0-9])")
_MARK_BEFORE_WORD = re.compile(r"(?<=[A-Za-z0-9）])([，。；：？！])(?=[A-Za-z（“‘])")
_MARK_AT_END = re.compile(r"(?<=[A-Za-z0-9）])[，。；：？！](?=[\s）”’]|\Z)")
_BRACKET_BEHIND_WORD = re.compile(r"(?<=[A-Za-z0-9,.;:?!])（")
_BRACKET_BEFORE_WORD = re.compile(r"）(?=[A-Za-z0-9])")


def punctuate(text: str) -> str:
    """Punctuation by context: Chinese between Han, ASCII in a text without Han and kana.

    >>> punctuate("你好, 世界! 中文(注释)共3,000元, 见f(x).")
    '你好，世界！中文（注释）共3,000元，见f(x).'
    >>> punctuate("Yes。No？See（figure 1）below。")
    'Yes. No? See (figure 1) below.'

    Code, URLs and indented lines stay.

    >>> punctuate("`甲,乙`是代码,对吧?")
    '`甲,乙`是代码，对吧？'
    """
    if _HAN_OR_KANA.search(text):
        return outside_code(_widen, text, CODE_OR_URL)
    if re.search("[A-Za-z]", text):
        return outside_code(_narrow, text, CODE_OR_URL)
    return text


def _widen(text: str) -> str:
    return _LINE_NOT_INDENTED.sub(lambda line: TO_CHINESE.sub(_wide, line[0]), text)


def _wide(mark: re.Match) -> str:
    """The Chinese form of a match of TO_CHINESE: a mark, or brackets with their content."""
    if mark[0][-1] in ")）":
        return f"（{mark[0][1:-1]}）"
    return mark[0].strip().translate(WIDE)


def _narrow(text: str) -> str:
    text = _COLON_IN_NUMBERS.sub(":", text)
    text = _MARK_BEFORE_WORD.sub(lambda mark: mark[1].translate(NARROW) + " ", text)
    text = _MARK_AT_END.sub(lambda mark: mark[0].translate(NARROW), text)
    text = _BRACKET_BEHIND_WORD.sub(" (", text)
    text = _BRACKET_BEFORE_WORD.sub(") ", text)
    return text.replace("（", "(").replace("）", ")")


# ---- 9. final: the full stop at the end

# Han at the end of the text, perhaps with closing brackets after it.
_ENDS_IN_HAN = re.compile(rf"[{HAN}][”’）》】」』)\]]{{0,3}}\Z")
_SENTENCE_MARK = re.compile("[，。；！？：、]")
NO_SENTENCE = re.compile(
    r"[-—–#*·•【＊★]"  # a heading or an item of a list: # 标题
    r"|\d+[.、）)]"  # a numbered item: 1. 苹果
    r"|[A-Za-z ]+[:：]"  # a label: title: 测试
    r"|.*★"  # a quotation with its source
    r"|.*[。！？]”?\s*[（(][^（()）]*[)）]\Z"  # a byline after a sentence: 他走了。（柴强/文）
    r"|.*——?\s*《[^《》]*》\Z"  # a quotation's source: ——《论语》
)


def final_punctuation(text: str) -> str:
    r"""A text that ends in Han, or in closing brackets right after Han, gets its 。

    >>> final_punctuation("今天天气不错"), final_punctuation("他说“走吧”")
    ('今天天气不错。', '他说“走吧”。')

    Any other text ends as it is. So does one whose last line is no sentence: a heading, a source,
    or one of several lines without punctuation.

    >>> final_punctuation("# 标题"), final_punctuation("- 苹果\n- 梨")
    ('# 标题', '- 苹果\n- 梨')
    """
    if not _ENDS_IN_HAN.search(text):
        return text
    *earlier, last = text.split("\n")
    if NO_SENTENCE.match(last) or not _is_part_of_sentence(last, earlier):
        return text
    return text + "。"


def _is_part_of_sentence(last: str, earlier: list[str]) -> bool:
    """Whether the last line is alone, has punctuation, or goes on with the line before it."""
    if not earlier or _SENTENCE_MARK.search(last):
        return True
    before = next((line for line in reversed(earlier) if line.strip()), "")
    return before.endswith(("，", "、", "；", "："))


# ---- the table

RULES: dict[str, Rule] = {
    "mojibake": repair_mojibake,  # before nfkc, which would change the misread bytes
    "html": strip_html,
    "invisible": drop_invisible,
    "space": tidy_space,  # before nfkc, which makes ordinary spaces of U+3000
    "nfkc": nfkc,
    "simplified": simplify,
    "repeated": collapse_repeated,
    "punctuation": punctuate,
    "final": final_punctuation,
}

# ---- texts that are built of layers
#
# A rule that removes something may join its neighbours to what the next sweep removes: `<<b>b>` is
# `<b>` then. One sweep takes one layer off, and a text may be built of thousands. Such a text loses
# the characters without which no layer is joined: then a few sweeps end it.

JOINTS: dict[str, re.Pattern] = {  # rule -> characters
    "mojibake": re.compile("[âã-éïð锟]"),
    "html": re.compile("[<&]"),
}


def without_joints(text: str, rules: Iterable[str]) -> str:
    """The text without the characters that join layers under these rules.

    >>> without_joints("甲<<<b>b>b>", ["html"])
    '甲b>b>b>'
    """
    for rule in rules:
        if rule in JOINTS:
            text = JOINTS[rule].sub("", text)
    return text
