"""Normalization is HF's, whose Unicode tables are older than those of any Python."""

import unicodedata

import pytest
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import normalizers

from nanophi.tokenizer import tokenizer
from nanophi.tokenizer.bpe import train_bpe
from nanophi.tokenizer.levels import ByteLevel
from nanophi.tokenizer.normal import NEWER, NEWER_CHARACTERS, UNCOMMON, normalize

NEWER_ONES = [chr(code) for first, last in NEWER for code in range(first, last + 1)]
ALL = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]

# A newer character between ordinary ones, and between marks that it must not reorder or join.
AROUND = ["感{}冒", "e\u0301{}\u0323\u0301", "\u0334\u0301{}\u0334", "{0}{0}\u0307", "Ａ{}が"]


@pytest.mark.parametrize("form", ["NFC", "NFKC"])
def test_every_character_is_normalized_as_hf_does(form):
    """U+32FF became two characters here, and stayed one in HF: the ids differed."""
    text = "\n".join(ALL)  # a line break joins nothing
    assert normalize(form, text) == getattr(normalizers, form)().normalize_str(text)
    for frame in AROUND:
        text = "\n".join(frame.format(char) for char in NEWER_ONES)
        assert normalize(form, text) == getattr(normalizers, form)().normalize_str(text)


def test_pairs_that_newer_versions_compose_stay_pairs():
    """Unicode 13 composes U+11935 with U+11930, and Unicode 16 knows twenty more such pairs."""
    for pair in ("\U00011935\U00011930", "\U000105d2\u0307", "\U0001611e\U0001611e"):
        assert normalize("NFC", pair) == pair == normalizers.NFC().normalize_str(pair)


def test_ordinary_text_takes_the_short_way():
    text = "感冒了，Ａ１ don't が é 😀👨‍👩‍👧 𠮷"
    assert UNCOMMON.search(text.replace("𠮷", "")) is None
    assert normalize("NFKC", text) == unicodedata.normalize("NFKC", text)
    assert all(UNCOMMON.match(char) and NEWER_CHARACTERS.match(char) for char in NEWER_ONES)


def test_ids_of_newer_characters_are_those_of_hf(tmp_path, monkeypatch):
    """One text at a time, and many texts together."""
    tok = train_bpe(["感冒了，多喝水"] * 3, 300, level="char", byte_fallback=True)
    tok.save(tmp_path)
    hf = HFTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    texts = [f"感{char}冒" for char in "㋿\ua7f2\uab69\U00010781\U0001f16c\U0001fbf0"]
    expected = [encoding.ids for encoding in hf.encode_batch(texts)]
    assert [tok.encode(text) for text in texts] == expected
    monkeypatch.setattr(tokenizer, "FEW_CHARACTERS", 0)
    assert tok.encode_batch(texts) == expected
    assert ByteLevel(nfc=True).normalized("a\u0898\u0323") == "a\u0898\u0323"
