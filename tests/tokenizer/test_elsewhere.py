"""Tokenizers that other trainers made: tiktoken's rank files, and sentencepiece.

Rank files: the same ids as the tokenizer they come from. sentencepiece: the ids of HF on the file,
sentencepiece's own on real text, and nothing is lost.
"""

import base64

import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer

import train_tokenizer
from nanophi.cli import UserError
from nanophi.tokenizer import tokenizer
from nanophi.tokenizer.bpe import train_bpe
from nanophi.tokenizer.elsewhere import load_ranks, train_sentencepiece
from nanophi.tokenizer.tokenizer import Tokenizer
from tests.conftest import TEXTS

# ---- tiktoken's rank files


@pytest.fixture(scope="module", params=["gpt2", "qwen2"])
def both(request, tmp_path_factory):
    """A tokenizer, and the same from a rank file.

    The rank file holds no special tokens, so that its ids are 7 smaller.
    """
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


def test_mistakes_in_rank_files(both, tmp_path):
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


# ---- sentencepiece


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Its directory, written by the command, and what ours and HF read from it."""
    out = tmp_path_factory.mktemp("pieces")
    (out / "text.txt").write_text(
        "\n".join(text.replace("\n", " ") for text in TEXTS), encoding="utf-8"
    )
    config = {"trainer": "sentencepiece", "vocab_size": 500, "report": False}
    train_tokenizer.main(
        train_tokenizer.Config(input=[str(out / "text.txt")], out=str(out), **config)
    )
    return out, Tokenizer.load(out), HFTokenizer.from_file(str(out / "tokenizer.json"))


@given(text=st.text() | st.text(st.sampled_from("感冒 ，。\n\tａ１aA鱻😀哈[EOS]"), max_size=40))
@example(text="  a  b \n\n[EOS]")
def test_ids_are_those_of_hf_and_nothing_is_lost(trained, text):
    _, tok, hf = trained
    hf.encode_special_tokens = True
    assert tok.encode(text) == hf.encode(text).ids
    assert tok.decode(tok.encode(text)) == text.replace("▁", " ")


def test_sentencepiece_itself_gives_the_same_ids(trained):
    out, tok, _ = trained
    own = sentencepiece.SentencePieceProcessor(model_file=str(out / "sentencepiece.model"))
    for text in TEXTS[:6]:
        assert tok.encode(text) == own.encode(text)


def test_batches_and_auto_tokenizer(trained, monkeypatch):
    from transformers import AutoTokenizer

    out, tok, _ = trained
    monkeypatch.setattr(tokenizer, "FEW_CHARACTERS", 0)
    texts = [*TEXTS, "鱻 Ａ１ 😀\n"]
    assert tok.encode_batch(texts) == [tok.encode(text) for text in texts]
    auto = AutoTokenizer.from_pretrained(out)
    assert (auto.eos_token_id, auto.pad_token_id) == (1, 0)
    assert [auto(text).input_ids for text in texts] == tok.encode_batch(texts)


def test_one_string_instead_of_texts_is_refused():
    with pytest.raises(UserError, match="train_sentencepiece takes a list of strings"):
        train_sentencepiece("感冒了要多喝水", 300)


def test_what_the_texts_raise_comes_out_of_sentencepiece():
    """sentencepiece said "a larger vocab_size may do", whatever had stopped the texts."""

    def texts():
        yield "感冒了"
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        train_sentencepiece(texts(), 300)
    with pytest.raises(UserError, match="half of a surrogate pair"):
        train_sentencepiece(["感冒了", "\ud83d"], 300)
