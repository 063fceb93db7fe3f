"""A tokenizer's level: how a text becomes words, and a word the symbols that merging starts from.

    "Ａ1 鱻"      normalized  words              symbols
    ByteLevel     "Ａ1 鱻"    "Ａ" "1" " 鱻"     UTF-8 bytes; any text survives
    CharLevel     "A1▁鱻"     "A" "1" "▁鱻"      characters; an unknown one is [UNK]
    PieceLevel    "Ａ1▁鱻"    "Ａ1▁鱻"           characters; an unknown one becomes its bytes

ByteLevel is GPT-2's and Qwen's. CharLevel is the char-level tokenizer of Phi2-mini-Chinese (only
its decoding differs). It applies NFKC, makes each digit and each mark a word, and writes a space as
"▁". With byte fallback a character unseen in training becomes its bytes, not [UNK]. NFKC makes
full-width letters narrow, so a round trip gives NFKC(text). PieceLevel is sentencepiece's.

Merging, added tokens and files are the same for all levels: see bpe.py, tokenizer.py, hf_json.py. A
token has a *spelling*, with which it stands in tokenizer.json, and `bytes_of` says what bytes that
spelling stands for:

    >>> ByteLevel().symbols("你")
    'ä½ł'
    >>> ByteLevel().bytes_of("ä½ł").decode()
    '你'

The methods that take or give arrays serve the fast half, nanophi/tokenizer/fast.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from nanophi.cli import UserError
from nanophi.expect import Expected, check
from nanophi.files import utf8
from nanophi.tokenizer.normal import normalize
from nanophi.tokenizer.splits import CHAR_SPLIT, SPLITS, char_starts, text_starts

# ---- How bytes are spelled


def byte_characters() -> list[str]:
    """GPT-2's stand-in character for each byte value, so that every token is printable text.

    A byte that is a printable Latin-1 character stands for itself; the others get the characters
    from U+0100 on, in order: the space, byte 0x20, gets U+0120.

    >>> characters = byte_characters()
    >>> characters[ord("A")], characters[0xE4], characters[ord(" ")], characters[ord("\\n")]
    ('A', 'ä', 'Ġ', 'Ċ')
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


BYTE_TO_CHAR = byte_characters()
CHAR_TO_BYTE = {char: byte for byte, char in enumerate(BYTE_TO_CHAR)}

# How a byte is spelled in a vocabulary of characters: <0x00> to <0xFF>.
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


# ---- The three levels


@dataclass(frozen=True)
class ByteLevel:
    """GPT-2's level: a split, then UTF-8 bytes.

    >>> level = ByteLevel("gpt2")
    >>> level.words("你好，don't worry")
    ['你好', '，', 'don', "'t", ' worry']
    >>> level.symbols(" a。")
    'ĠaãĢĤ'
    """

    split: str = "gpt2"  # a name in splits.SPLITS
    nfc: bool = False  # compose characters first, as Qwen does; without it any text survives

    name = "byte"
    byte_fallback = False  # every byte is in the vocabulary anyway

    @cached_property
    def pattern(self) -> Any:
        import regex  # imported here, so that the model and the training loop run without it

        return regex.compile(SPLITS[self.split].pattern)

    def normalized(self, text: str) -> str:
        """The text that is split and encoded."""
        return normalize("NFC", text) if self.nfc else text

    def words(self, text: str) -> list[str]:
        """The words (pre-tokens) of a normalized text."""
        return self.pattern.findall(text)

    def symbols(self, word: str) -> str:
        """What merging starts from: one character of the result is one token."""
        return "".join(BYTE_TO_CHAR[byte] for byte in utf8(word))

    def alphabet(self, words: Iterable[str]) -> list[str]:
        """The tokens before any merge, in HF's order: by stand-in character, not by byte value."""
        return sorted(BYTE_TO_CHAR)

    def bytes_of(self, token: str) -> bytes:
        """The bytes that a token's spelling stands for."""
        return bytes(CHAR_TO_BYTE[char] for char in token)

    def starts(self, codes: np.ndarray) -> np.ndarray:
        """Where words begin in the code points (N,) of normalized text. (N,) bool."""
        return SPLITS[self.split].starts(codes)

    def symbol_codes(self, codes: np.ndarray) -> np.ndarray:
        """Code points -> the bytes of their UTF-8. A BREAK becomes 0xFF, which UTF-8 never uses.

        >>> from nanophi.tokenizer.splits import BREAK
        >>> ByteLevel().symbol_codes(np.array([ord("你"), BREAK], np.uint32))
        array([228, 189, 160, 255], dtype=uint8)
        """
        text = codes.tobytes().decode("utf-32-le", "surrogatepass")
        return np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8)

    def lookup(self, ids: dict[str, int], gap: int, id_type: type = np.uint16) -> np.ndarray:
        """The table that turns `symbol_codes` into ids, and a BREAK into `gap`. (256,)."""
        return np.array([ids[char] for char in BYTE_TO_CHAR[:255]] + [gap], id_type)


@dataclass(frozen=True)
class CharLevel:
    """The original's char level: NFKC, digits and punctuation alone, then characters.

    >>> level = CharLevel()
    >>> level.normalized("Ａ12，好 的")
    'A12,好▁的'
    >>> level.words("A12,好▁的")
    ['A', '1', '2', ',', '好', '▁的']
    """

    byte_fallback: bool = False  # an unknown character becomes its bytes, not [UNK]

    name = "char"

    @cached_property
    def pattern(self) -> Any:
        import regex

        return regex.compile(CHAR_SPLIT)

    def normalized(self, text: str) -> str:
        """The text that is split and encoded."""
        return normalize("NFKC", text).replace(" ", "▁")

    def words(self, text: str) -> list[str]:
        """The words (pre-tokens) of a normalized text."""
        return self.pattern.findall(text)

    def symbols(self, word: str) -> str:
        """What merging starts from: the characters of the word."""
        return word

    def alphabet(self, words: Iterable[str]) -> list[str]:
        """The tokens before any merge: bytes, if there is a fallback to them, then characters.

        >>> CharLevel().alphabet(["好的", "不好"])
        ['不', '好', '的']
        """
        characters = sorted(set().union(*words))
        if self.byte_fallback:
            return BYTE_TOKENS + characters
        return characters

    def bytes_of(self, token: str) -> bytes:
        """The bytes that a token's spelling stands for.

        >>> CharLevel(byte_fallback=True).bytes_of("<0xE4>"), CharLevel().bytes_of("▁A")
        (b'\\xe4', b' A')
        """
        # The length is compared first because searching the list is slow.
        if self.byte_fallback and len(token) == len("<0xFF>") and token in BYTE_TOKENS:
            return bytes([BYTE_TOKENS.index(token)])
        return utf8(token.replace("▁", " "))

    def starts(self, codes: np.ndarray) -> np.ndarray:
        """Where words begin in the code points (N,) of normalized text. (N,) bool."""
        return char_starts(codes)

    def symbol_codes(self, codes: np.ndarray) -> np.ndarray:
        """The code points themselves: a symbol is a character."""
        return codes

    def lookup(self, ids: dict[str, int], gap: int) -> np.ndarray:
        """The table that turns code points into ids, and a BREAK into `gap`. (0x110000,)."""
        table = np.full(0x110000, gap, np.uint16)
        for symbol, i in ids.items():
            if len(symbol) == 1:
                table[ord(symbol)] = i
        return table


class PieceLevel(CharLevel):
    """sentencepiece's level: a text is one word, and only a space changes: it becomes "▁"."""

    def __init__(self) -> None:
        super().__init__(byte_fallback=True)

    def normalized(self, text: str) -> str:
        return text.replace(" ", "▁")

    def words(self, text: str) -> list[str]:
        return [text] if text else []

    def starts(self, codes: np.ndarray) -> np.ndarray:
        return text_starts(codes)


Level = ByteLevel | CharLevel


def level_named(name: str, byte_fallback: bool = False, split: str = "gpt2") -> Level:
    """The level "byte" or "char".

    byte_fallback: at the level "char" a character unseen in training becomes its bytes, not [UNK].
    split: at the level "byte" a name in splits.SPLITS.
    """
    check(byte_fallback, Expected(bool), "byte_fallback")
    if name not in ("byte", "char"):
        raise UserError(f"level {name!r} is not known; there are 'byte' and 'char'")
    if split not in list(SPLITS):  # a list, because what is no name may have no hash
        raise UserError(f"split {split!r} is not known; there are {', '.join(SPLITS)}")
    if name == "char":
        return CharLevel(byte_fallback)
    if byte_fallback:
        raise UserError(
            "byte fallback is for the level 'char'; the level 'byte' knows every byte anyway"
        )
    return ByteLevel(split)
