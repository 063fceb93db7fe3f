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
from nanophi.files import utf8
from nanophi.tokenizer.splits import ALONE, BREAK, changes, char_starts, gpt2_starts, qwen2_starts

# GPT-2's split (Radford et al. 2019): contractions, words, numbers and symbols each with the space before, white space.
# Chinese has no spaces, so a whole clause between two punctuation marks is one pre-token.
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# Qwen2's: digits one by one, line breaks with the punctuation before them, one mark or blank with letters behind it.
QWEN2_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {"gpt2": (GPT2_SPLIT, gpt2_starts), "qwen2": (QWEN2_SPLIT, qwen2_starts)}

# HF's Punctuation, Digits(individual_digits=True) and Metaspace(prepend_scheme="never") in one pattern. Its Unicode
# tables are older than regex's: a few hundred rare marks and cuneiform numbers, none of them Chinese, differ.
CHAR_SPLIT = rf"[{ALONE}]|▁?[^{ALONE}▁]+|▁"


def byte_characters() -> list[str]:
    """GPT-2's stand-in character of each byte value: itself where printable in Latin-1, else one from U+0100 on."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


BYTE_TO_CHAR = byte_characters()
CHAR_TO_BYTE = {char: byte for byte, char in enumerate(BYTE_TO_CHAR)}
BYTE_TOKENS = [
    f"<0x{byte:02X}>" for byte in range(256)
]  # the usual spelling of a byte beside characters


class ByteLevel:
    name, byte_fallback = "byte", False

    def __init__(self, split: str = "gpt2", nfc: bool = False):
        """nfc: compose characters first, as Qwen's tokenizers do; without it any text survives the round trip."""
        self.split, self.nfc = split, nfc

    @cached_property
    def pattern(self):
        import regex  # here, so that the model and the training loop run without it

        return regex.compile(SPLITS[self.split][0])

    def normalized(self, text: str) -> str:
        return unicodedata.normalize("NFC", text) if self.nfc else text

    def words(self, text: str) -> list[str]:
        """The pre-tokens of a normalized text."""
        return self.pattern.findall(text)

    def symbols(self, word: str) -> str:
        """A word -> what merging starts from, one character of the result a token."""
        return "".join(BYTE_TO_CHAR[byte] for byte in utf8(word))

    def starts(self, codes: np.ndarray) -> np.ndarray:
        """Where words begin in normalized text, as code points."""
        return SPLITS[self.split][1](codes)

    def symbol_codes(self, codes: np.ndarray) -> np.ndarray:
        """Code points -> the bytes of their UTF-8; BREAK becomes 0xFF, which UTF-8 never uses."""
        text = codes.tobytes().decode("utf-32-le", "surrogatepass")
        return np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8)

    def lookup(self, ids: dict[str, int], gap: int, id_type: type = np.uint16) -> np.ndarray:
        """What turns `symbol_codes` into ids, and BREAK into `gap`: (256,)."""
        return np.array([ids[char] for char in BYTE_TO_CHAR[:255]] + [gap], id_type)

    def alphabet(self, words: Iterable[str]) -> list[str]:
        """The tokens before any merge, in the order of HF's trainer: by stand-in character, not by byte value."""
        return sorted(BYTE_TO_CHAR)

    def bytes_of(self, token: str) -> bytes:
        return bytes(CHAR_TO_BYTE[char] for char in token)

    def settings(self) -> dict:
        """The level's entries in tokenizer.json."""
        byte_level = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        }
        splits = byte_level
        if self.split != "gpt2":  # which ByteLevel itself has
            pattern = {"Regex": SPLITS[self.split][0]}
            first = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
            splits = {
                "type": "Sequence",
                "pretokenizers": [first, byte_level | {"use_regex": False}],
            }
        normalizer = {"type": "NFC"} if self.nfc else None
        return {
            "normalizer": normalizer,
            "pre_tokenizer": splits,
            "post_processor": None,
            "decoder": byte_level,
        }


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
        alone = [
            {"type": "Punctuation", "behavior": "Isolated"},
            {"type": "Digits", "individual_digits": True},
        ]
        whole = {"type": "Sequence", "decoders": [space, {"type": "ByteFallback"}]}
        return {
            "normalizer": {"type": "NFKC"},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*alone, space]},
            "post_processor": None,
            "decoder": whole if self.byte_fallback else space,
        }


class PieceLevel(CharLevel):
    """sentencepiece's: a text is one word, nothing is normalized, a character that is no token becomes its bytes."""

    def __init__(self):
        super().__init__(byte_fallback=True)

    def normalized(self, text: str) -> str:
        return text.replace(" ", "▁")

    def words(self, text: str) -> list[str]:
        return [text] if text else []

    def starts(self, codes: np.ndarray) -> np.ndarray:
        return changes(codes == BREAK) | (codes == BREAK)

    def settings(self) -> dict:
        to_mark = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        to_space = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
        decoders = [to_space, {"type": "ByteFallback"}, {"type": "Fuse"}]
        return {
            "normalizer": to_mark,
            "pre_tokenizer": None,
            "post_processor": None,
            "decoder": {"type": "Sequence", "decoders": decoders},
        }


Level = ByteLevel | CharLevel


def level_named(name: str, byte_fallback: bool = False, split: str = "gpt2") -> Level:
    """ "byte" or "char" -> the level. byte_fallback: at char level a character unseen in training becomes its bytes,
    not [UNK]; split: at byte level "gpt2" or "qwen2"."""
    if name not in ("byte", "char"):
        raise UserError(f"level {name!r} is not known; there are 'byte' and 'char'")
    if split not in SPLITS:
        raise UserError(f"split {split!r} is not known; there are {', '.join(SPLITS)}")
    if name == "char":
        return CharLevel(byte_fallback)
    if byte_fallback:
        raise UserError(
            "byte fallback is for the level 'char'; the level 'byte' knows every byte anyway"
        )
    return ByteLevel(split)


def misshapen(data) -> str | None:
    """What of a tokenizer.json is not of the shape that reading it relies on; None where all is."""
    if not isinstance(data, dict) or not isinstance(data.get("model"), dict):
        return "it is no object with a model"
    for name in ("pre_tokenizer", "normalizer", "post_processor"):
        if not isinstance(data.get(name), dict | None):
            return f"{name} is no object"
    splits = (data.get("pre_tokenizer") or {}).get("pretokenizers", [{}])
    if not (isinstance(splits, list) and splits and all(isinstance(part, dict) for part in splits)):
        return "pretokenizers is no list of objects"
    added = data.setdefault("added_tokens", [])
    if not isinstance(added, list) or not all(
        isinstance(token, dict)
        and isinstance(token.get("content"), str)
        and isinstance(token.get("special"), bool)
        and _is_id(token.get("id"))
        for token in added
    ):
        return "added_tokens is no list of objects with content, id and special"
    if data["model"].get("type") != "BPE":
        return None  # the level says so better
    vocab, merges = data["model"].get("vocab"), data["model"].get("merges")
    if not isinstance(vocab, dict) or not all(map(_is_id, vocab.values())):
        return "model.vocab is no object of ids"
    if len(set(vocab.values())) < len(vocab):
        return "two tokens of model.vocab have one id"
    if not isinstance(merges, list):
        return "model.merges is no list of pairs"
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    if not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(p, str) for p in pair)
        for pair in pairs
    ):
        return "model.merges is no list of pairs"
    return (
        "a merge stands twice in model.merges" if len(set(map(tuple, pairs))) < len(pairs) else None
    )


def _is_id(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _split_of(splits: dict) -> str | None:
    """The name of a byte-level pre_tokenizer's split, None where it is another."""
    parts = splits.get("pretokenizers", [splits])
    last = parts[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if len(parts) == 1:
        return "gpt2" if last.get("use_regex", True) else None
    first = parts[0]
    if (
        len(parts) > 2
        or first.get("type") != "Split"
        or first.get("behavior") != "Isolated"
        or first.get("invert")
    ):
        return None
    patterns = {pattern: name for name, (pattern, _) in SPLITS.items()}
    return (
        None if last.get("use_regex", True) else patterns.get(first.get("pattern", {}).get("Regex"))
    )


def level_of(data: dict, path: Path) -> Level:
    """The level of a tokenizer.json. Other settings would load and give other ids, so they are refused."""
    splits, model, normalizer = (
        data.get("pre_tokenizer") or {},
        data.get("model") or {},
        data.get("normalizer"),
    )
    flags = [
        token.get(name)
        for token in data.get("added_tokens", [])
        for name in ("lstrip", "rstrip", "single_word")
    ]
    kinds = [part.get("type") for part in splits.get("pretokenizers", [splits])]
    split = _split_of(splits)
    level = (
        ByteLevel(split or "gpt2", nfc=bool(normalizer)) if "ByteLevel" in kinds else CharLevel()
    )
    if level.name == "char":
        level = CharLevel(bool(model.get("byte_fallback")))
        if not splits and level.byte_fallback:
            level = PieceLevel()
    known = model.get("type") == "BPE" and (
        level.name == "byte" or model.get("unk_token") == "[UNK]"
    )
    same_split = (
        split is not None
        if level.name == "byte"
        else splits == (level.settings()["pre_tokenizer"] or {})
    )
    post = (data.get("post_processor") or {}).get("type")
    other = [name for name in ("truncation", "padding") if data.get(name)]
    other += [
        name
        for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
        if model.get(name)
    ]
    other += (
        ["fuse_unk"]
        if level.name == "char" and model.get("fuse_unk") and not level.byte_fallback
        else []
    )
    other += ["ignore_merges"] if model.get("ignore_merges") else []
    if level.name == "char":
        tokens = data.get("added_tokens", [])
        other += (
            ["normalized"]
            if any(t.get("normalized", True) == t.get("special") for t in tokens)
            else []
        )
    for right, what in (
        (known, f"a model {model.get('type')} with pre_tokenizer {'+'.join(map(str, kinds))} is not read; "
                "byte-level BPE, and char-level BPE with [UNK], are"),
        (same_split, f"this pre_tokenizer ({'+'.join(map(str, kinds))}) splits otherwise than gpt2, qwen2, or the char "
                     "level of train_tokenizer.py"),
        (normalizer == level.settings()["normalizer"], f"the normalizer {normalizer} is not supported"),
        (post in (None, "ByteLevel"), f"the post_processor {post} is not supported"),
        (not any(flags), "lstrip, rstrip and single_word of added tokens are not supported"),
        (not other, f"the settings {', '.join(other)} are not supported"),
    ):  # fmt: skip
        if not right:
            raise UserError(f"{path}: {what}")
    return level
