"""Encoding in batches gives the ids of encoding one by one.

Those are the ids of HF tokenizers: see test_tokenizer.py and test_splits.py.
"""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nanophi.cli import UserError
from nanophi.tokenizer import tokenizer
from nanophi.tokenizer.bpe import train_bpe
from nanophi.tokenizer.fast import encoder, words
from nanophi.tokenizer.tokenizer import Tokenizer
from tests.conftest import TEXTS

LEVELS = {
    "gpt2": {}, "qwen2": {"split": "qwen2"}, "char": {"level": "char"},
    "char with bytes": {"level": "char", "byte_fallback": True},
}  # fmt: skip
soup = st.text(
    st.sampled_from("感冒了要多喝水，。？望明月\n\t  a'st1[EOS]😀鱻\u200bé哈"), max_size=40
)
texts = st.lists(st.text() | soup | st.sampled_from(TEXTS), max_size=6)


@pytest.fixture(scope="module", autouse=True)
def batches_however_small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "FEW_CHARACTERS", 0)
        yield


@pytest.fixture(scope="module", params=LEVELS, ids=lambda name: name.replace(" ", "-"))
def tok(request) -> Tokenizer:
    return train_bpe(TEXTS, 700, **LEVELS[request.param])


@given(texts=texts)
@example(texts=[])
@example(texts=["", "感", "", "a [EOS] b[PAD]", ""])
@example(texts=["感冒" * 100, "哈" * 1000, "鱻" * 70 + "哈哈"])
def test_batches_give_the_ids_of_single_texts(tok, texts):
    assert tok.encode_batch(texts) == [tok.encode(text) for text in texts]
    assert tok.encode_batch(texts, specials=True) == [
        tok.encode(text, specials=True) for text in texts
    ]


@given(texts=texts)
def test_a_hash_that_is_anothers_changes_nothing(texts):
    """Parts of more than three characters are found by a hash; here all have the same one."""
    tok = train_bpe(TEXTS, 700)
    true_keys = words.keys_of

    def same_for_all(*where):
        keys = true_keys(*where)
        return np.where(keys >> np.uint64(63), np.uint64(1 << 63), keys)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words, "keys_of", same_for_all)
        assert tok.encode_batch(texts) == [tok.encode(text) for text in texts]


def test_memory_of_parts_is_bounded(tok, monkeypatch):
    monkeypatch.setattr(encoder, "MOST_PARTS", 3)
    monkeypatch.setattr(words, "BLOCK_CHARACTERS", 10)
    ids = tok.encode_batch(TEXTS)
    assert ids == [tok.encode(text) for text in TEXTS]
    assert len(tok._encoder.store) < sum(map(len, TEXTS)) / 4


@pytest.mark.parametrize("level", ["byte", "char"])
def test_a_tokenizer_without_merges(level):
    tok = train_bpe(TEXTS, 2000, min_frequency=10**6, level=level)
    assert tok.merges == {}
    assert tok.encode_batch(TEXTS) == [tok.encode(text) for text in TEXTS]


def test_added_tokens_are_found_in_batches_too(tok):
    tok = Tokenizer(tok.level, list(tok.vocab), tok.merge_list)
    before = tok.encode_batch(TEXTS)
    tok.add_tokens(["<工具>"])
    texts = [*TEXTS, "请用<工具>查一下"]
    assert tok.encode_batch(texts) == [tok.encode(text) for text in texts]
    assert tok.encode_batch(TEXTS) == before


def test_specials_are_sought_in_the_text_as_it_stands():
    """At char level a blank becomes "▁", and batches looked for [MY TOK] only then, in vain."""
    tok = train_bpe(TEXTS, 700, level="char")
    tok.added["[MY TOK]"] = len(tok)
    tok.specials.add("[MY TOK]")
    tok._index()
    texts = ["感冒 [MY TOK] 了", "［EOS］"]
    assert tok.encode_batch(texts, specials=True) == [
        tok.encode(text, specials=True) for text in texts
    ]
    assert tok.special_id("[MY TOK]") in tok.encode(texts[0], specials=True)


def test_offsets_at_char_level():
    tok = train_bpe(TEXTS, 700, level="char")
    ids, offsets = tok.encode_with_offsets("感鱻 月")
    assert ids[1] == tok.special_id("[UNK]")
    assert [(offsets[0][0], offsets[0][1]), offsets[1], offsets[-1][1]] == [(0, 1), (1, 2), 4]


def test_half_a_surrogate_pair_is_refused_with_its_place(tok):
    for encode in (tok.encode, lambda text: tok.encode_batch([text])):
        with pytest.raises(UserError, match="half of a surrogate pair"):
            encode("好\ud83d")
