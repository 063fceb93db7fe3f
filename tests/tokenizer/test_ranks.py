"""tiktoken's rank files: the same ids as the tokenizer they come from."""

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanophi.cli import UserError
from nanophi.tokenizer.bpe import train_bpe
from nanophi.tokenizer.ranks import load_ranks
from nanophi.tokenizer.tokenizer import Tokenizer
from tests.conftest import TEXTS


@pytest.fixture(scope="module", params=["gpt2", "qwen2"])
def both(request, tmp_path_factory):
    """A tokenizer, and the same from a rank file, which knows no special tokens: its ids are 7 smaller."""
    tok = train_bpe(TEXTS, 600, split=request.param)
    path = tmp_path_factory.mktemp("ranks") / "own.tiktoken"
    lines = [base64.b64encode(tok.id_to_bytes[i]) + b" %d\n" % (i - 7) for i in range(7, len(tok))]
    path.write_bytes(b"".join(lines))
    return tok, load_ranks(path, request.param, {"<|end|>": len(tok) - 7})


@given(text=st.text() | st.sampled_from(TEXTS))
def test_ids_are_the_same(both, text):
    tok, ranked = both
    assert ranked.encode(text) == [i - 7 for i in tok.encode(text)]
    assert ranked.decode(ranked.encode(text)) == text


def test_it_can_be_saved_and_loaded(both, tmp_path):
    tok, ranked = both
    assert ranked.merge_list == [(left - 7, right - 7) for left, right in tok.merge_list]
    ranked.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.fingerprint == ranked.fingerprint
    assert again.encode("好<|end|>", specials=True)[-1] == len(tok) - 7


def test_mistakes(both, tmp_path):
    path = tmp_path / "x.tiktoken"
    path.write_text("AA== 0\n!! 1\n")
    with pytest.raises(UserError, match=r"x\.tiktoken, line 2: not a token"):
        load_ranks(path)
    path.write_text("AA== 0\nAQ== 0\n")
    with pytest.raises(UserError, match=r"line 2: the token or its rank 0 stands there twice"):
        load_ranks(path)
    path.write_text("AA== 0\n")
    with pytest.raises(UserError, match="255 of the 256 bytes are missing"):
        load_ranks(path)
