"""What a tokenizer's level decides: how text becomes words, and a word the symbols that merging starts from.

    byte   GPT-2's split, then UTF-8 bytes: any text survives the round trip
    char   NFKC, punctuation and digits each for themselves, "▁" for a space, then characters: as the original's
           char-level tokenizer, but for its decoding. A character unseen in training is [UNK], or with byte fallback
           its bytes; NFKC makes full-width letters narrow either way, so the round trip gives NFKC(text)

Merging, added tokens and files are the same for both: text/tokenizer.py, text/bpe.py. tokenizer.json spells a token as
HF tokenizers does; `bytes_of` is what that spelling stands for.
"""

import unicodedata
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np

from nanophi.cli import UserError
from nanophi.text.splits import ALONE, char_starts, gpt2_starts

# GPT-2's split (Radford et al. 2019): contractions, words, numbers and symbols each with the space before, white space.
# Chinese has no spaces, so a whole clause between two punctuation marks is one pre-token.
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# HF's Punctuation, Digits(individual_digits=True) and Metaspace(prepend_scheme="never") in one pattern. Its Unicode
# tables are older than regex's: a few hundred rare marks and cuneiform numbers, none of them Chinese, differ.
CHAR_SPLIT = rf"[{ALONE}]|▁?[^{ALONE}▁]+|▁"


def byte_characters() -> list[str]:
    """GPT-2's stand-in character of each byte value: itself where printable in Latin-1, else one from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


BYTE_TO_CHAR = byte_characters()
CHAR_TO_BYTE = {char: byte for byte, char in enumerate(BYTE_TO_CHAR)}
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]  # the usual spelling of a byte beside characters


def utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


class ByteLevel:
    name, byte_fallback = "byte", False

    @cached_property
    def pattern(self):
        import regex  # here, so that the model and the training loop run without it

        return regex.compile(GPT2_SPLIT)

    def normalized(self, text: str) -> str:
        return text

    def words(self, text: str) -> list[str]:
        """The pre-tokens of a normalized text."""
        return self.pattern.findall(text)

    def symbols(self, word: str) -> str:
        """A word -> what merging starts from, one character of the result a token."""
        return "".join(BYTE_TO_CHAR[byte] for byte in utf8(word))

    def starts(self, codes: np.ndarray) -> np.ndarray:
        """Where words begin in normalized text, as code points."""
        return gpt2_starts(codes)

    def symbol_codes(self, codes: np.ndarray) -> np.ndarray:
        """Code points -> the bytes of their UTF-8; BREAK becomes 0xFF, which UTF-8 never uses."""
        text = codes.tobytes().decode("utf-32-le", "surrogatepass")
        return np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8)

    def lookup(self, ids: dict[str, int], gap: int) -> np.ndarray:
        """What turns `symbol_codes` into ids, and BREAK into `gap`: (256,)."""
        return np.array([ids[char] for char in BYTE_TO_CHAR[:255]] + [gap], np.uint16)

    def alphabet(self, words: Iterable[str]) -> list[str]:
        """The tokens before any merge, in the order of HF's trainer: by stand-in character, not by byte value."""
        return sorted(BYTE_TO_CHAR)

    def bytes_of(self, token: str) -> bytes:
        return bytes(CHAR_TO_BYTE[char] for char in token)

    def settings(self) -> dict:
        """The level's entries in tokenizer.json."""
        split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        return {"normalizer": None, "pre_tokenizer": split, "post_processor": None, "decoder": split}


class CharLevel:
    name = "char"

    def __init__(self, byte_fallback: bool = False):
        self.byte_fallback = byte_fallback

    @cached_property
    def pattern(self):
        import regex

        return regex.compile(CHAR_SPLIT)

    def normalized(self, text: str) -> str:
        return unicodedata.normalize("NFKC", text).replace(" ", "▁")

    def words(self, text: str) -> list[str]:
        return self.pattern.findall(text)

    def symbols(self, word: str) -> str:
        return word

    def starts(self, codes: np.ndarray) -> np.ndarray:
        return char_starts(codes)

    def symbol_codes(self, codes: np.ndarray) -> np.ndarray:
        return codes

    def lookup(self, ids: dict[str, int], gap: int) -> np.ndarray:
        """What turns code points into ids, and BREAK into `gap`: (0x110000,)."""
        table = np.full(0x110000, gap, np.uint16)
        for symbol, i in ids.items():
            if len(symbol) == 1:
                table[ord(symbol)] = i
        return table

    def alphabet(self, words: Iterable[str]) -> list[str]:
        """The characters of the words by code point; the bytes, where there is a fallback to them, come first."""
        return [*(BYTE_TOKENS if self.byte_fallback else ()), *sorted(set().union(*words))]

    def bytes_of(self, token: str) -> bytes:
        if self.byte_fallback and len(token) == len("<0xFF>") and token in BYTE_TOKENS:
            return bytes([BYTE_TOKENS.index(token)])
        return utf8(token.replace("▁", " "))

    def settings(self) -> dict:
        space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": True}
        alone = [{"type": "Punctuation", "behavior": "Isolated"}, {"type": "Digits", "individual_digits": True}]
        whole = {"type": "Sequence", "decoders": [space, {"type": "ByteFallback"}]}
        return {
            "normalizer": {"type": "NFKC"},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*alone, space]},
            "post_processor": None,
            "decoder": whole if self.byte_fallback else space,
        }


Level = ByteLevel | CharLevel


def level_named(name: str, byte_fallback: bool = False) -> Level:
    """ "byte" or "char" -> the level; byte_fallback: a character unseen in training becomes its bytes, not [UNK]."""
    if name == "char":
        return CharLevel(byte_fallback)
    if name != "byte":
        raise UserError(f"level {name!r} is not known; there are 'byte' and 'char'")
    if byte_fallback:
        raise UserError("byte fallback is for the level 'char'; the level 'byte' knows every byte anyway")
    return ByteLevel()


def level_of(data: dict, path: Path) -> Level:
    """The level of a tokenizer.json. Other settings would load and give other ids, so they are refused."""
    splits, model = data.get("pre_tokenizer") or {}, data.get("model") or {}
    flags = [token.get(name) for token in data.get("added_tokens", []) for name in ("lstrip", "rstrip", "single_word")]
    level = CharLevel(bool(model.get("byte_fallback"))) if splits.get("type") == "Sequence" else ByteLevel()
    same_normalizer = data.get("normalizer") == level.settings()["normalizer"]
    is_bpe = model.get("type") == "BPE"
    if isinstance(level, ByteLevel):
        known = is_bpe and splits.get("type") == "ByteLevel"
        same_split = splits.get("use_regex", True) and not splits.get("add_prefix_space")
    else:
        known = is_bpe and model.get("unk_token") == "[UNK]"
        same_split = splits == level.settings()["pre_tokenizer"]
    for right, what in (
        (known, "only byte-level BPE, and char-level BPE with [UNK], are read"),
        (same_split, "only GPT-2's split, and the char-level one of train_tokenizer.py, are read"),
        (same_normalizer, "this normalizer is not supported (byte level has none, char level NFKC)"),
        ((data.get("post_processor") or {}).get("type") in (None, "ByteLevel"), "a post-processor is not supported"),
        (not model.get("ignore_merges") and not any(flags), "ignore_merges, strip and single_word are not supported"),
    ):
        if not right:
            raise UserError(f"{path}: {what}")
    return level
