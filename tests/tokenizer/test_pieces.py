"""A tokenizer trained by sentencepiece: the ids of HF on the file, sentencepiece's own on real text, nothing lost."""

import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer

import train_tokenizer
from nanophi.tokenizer.tokenizer import Tokenizer
from tests.conftest import TEXTS


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

    from nanophi.tokenizer import tokenizer

    out, tok, _ = trained
    monkeypatch.setattr(tokenizer, "FEW_CHARACTERS", 0)
    texts = [*TEXTS, "鱻 Ａ１ 😀\n"]
    assert tok.encode_batch(texts) == [tok.encode(text) for text in texts]
    auto = AutoTokenizer.from_pretrained(out)
    assert (auto.eos_token_id, auto.pad_token_id) == (1, 0)
    assert [auto(text).input_ids for text in texts] == tok.encode_batch(texts)
