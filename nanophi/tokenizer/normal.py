"""NFC and NFKC as HF tokenizers have them: those of Unicode 9, on every version of Python.

HF normalizes with tables of Unicode 9, and Python with those of its own version. A character that
is newer than Unicode 9 has no decomposition for HF, joins no other character, and stays in its
place:

    character   Python's NFKC   HF's NFKC
    ㋾ U+32FE   ヲ              ヲ
    ㋿ U+32FF   令和            ㋿         since Unicode 12.1

So a text is cut at such characters, the pieces between them are normalized, and the characters stay
as they are. Normalization of older characters never changes.
"""

import re
import unicodedata
from typing import Literal

# Ranges of code points, both ends included, that hold every character newer than Unicode 9 (and up
# to Unicode 18) to which normalization does something. What else they hold stays as it is anyway.
NEWER = (
    *((0x0558, 0x0558), (0x058B, 0x058C), (0x05C8, 0x05C9), (0x07FD, 0x07FD), (0x0897, 0x08D3)),
    *((0x09FE, 0x09FE), (0x0C3C, 0x0C3C), (0x0D3B, 0x0D3C), (0x0EBA, 0x0EBA), (0x1715, 0x1715)),
    *((0x1ABF, 0x1AF0), (0x1DF6, 0x1DFA), (0x209D, 0x209F), (0x32FF, 0x32FF), (0xA7F1, 0xA7F4)),
    *((0xA82C, 0xA82C), (0xAB69, 0xAB69), (0x105C9, 0x107BF), (0x10D24, 0x10F85)),
    *((0x11070, 0x11070), (0x1133B, 0x1133B), (0x11382, 0x113D0), (0x1145E, 0x1145E)),
    *((0x11839, 0x11A99), (0x11D42, 0x1612F), (0x16D63, 0x1B126), (0x1CCD6, 0x1D128)),
    *((0x1D250, 0x1D281), (0x1D6A6, 0x1D6A6), (0x1DF95, 0x1DFFF), (0x1E030, 0x1E6F5)),
    *((0x1F16C, 0x1F16C), (0x1FBF0, 0x1FBF9)),
)
NEWER_CHARACTERS = re.compile("[" + "".join(f"{chr(a)}-{chr(b)}" for a, b in NEWER) + "]+")

# Whatever is not among the characters of ordinary text: it is found much faster.
UNCOMMON = re.compile(
    "[^\0-\u0557\u2000-\u209c\u20a0-\u32fe\u3300-\ua7f0\uac00-\uffff\U0001f170-\U0001fbef]"
)


def normalize(form: Literal["NFC", "NFKC"], text: str) -> str:
    """`unicodedata.normalize` with Unicode 9.

    >>> normalize("NFKC", "Ａ㋾"), normalize("NFKC", "Ａ㋿Ａ")
    ('Aヲ', 'A㋿A')
    """
    if text.isascii() or UNCOMMON.search(text) is None:
        return unicodedata.normalize(form, text)
    parts = []
    end = 0
    for newer in NEWER_CHARACTERS.finditer(text):
        parts.append(unicodedata.normalize(form, text[end : newer.start()]))
        parts.append(newer.group())
        end = newer.end()
    parts.append(unicodedata.normalize(form, text[end:]))
    return "".join(parts)
