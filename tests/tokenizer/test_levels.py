"""The char level against HF's pipeline of the same parts.

The byte level is tested in test_tokenizer.py and test_bpe.py.
"""

import json
import unicodedata

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from nanophi.cli import UserError
from nanophi.tokenizer.bpe import train_bpe
from nanophi.tokenizer.chat import chat_prompt
from nanophi.tokenizer.levels import BYTE_TOKENS
from nanophi.tokenizer.tokenizer import SPECIAL_TOKENS, Tokenizer
from tests.conftest import TEXTS

# Characters assigned in Unicode 3.2. Each library splits newer characters as its own Unicode tables
# have it. U+166D has moved from punctuation to symbols since then.
old_characters = st.characters(exclude_categories=["Cs"], exclude_characters="\u166d").filter(
    lambda char: unicodedata.ucd_3_2_0.category(char) != "Cn"
)
any_text = st.text(old_characters) | st.text(
    st.sampled_from("感冒了Ａ１2①㎏,，。… \n\t▁　a'st[EOS]<0x41>é😀鱻"), max_size=60
)


def hf_char_level(byte_fallback: bool) -> HFTokenizer:
    hf = HFTokenizer(models.BPE(unk_token="[UNK]", byte_fallback=byte_fallback))
    hf.normalizer = normalizers.NFKC()
    space = pre_tokenizers.Metaspace(prepend_scheme="never")
    alone = [pre_tokenizers.Punctuation(), pre_tokenizers.Digits(individual_digits=True)]
    hf.pre_tokenizer = pre_tokenizers.Sequence([*alone, space])
    whole = decoders.Metaspace(prepend_scheme="never")
    hf.decoder = decoders.Sequence([whole, decoders.ByteFallback()]) if byte_fallback else whole
    return hf


def hf_trained(texts, vocab_size, min_frequency=2, byte_fallback=False) -> HFTokenizer:
    hf = hf_char_level(byte_fallback)
    specials = [*SPECIAL_TOKENS, *(BYTE_TOKENS if byte_fallback else ())]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=specials,
        show_progress=False,
    )
    hf.train_from_iterator(texts, trainer)
    return hf


@pytest.fixture(scope="module", params=[False, True], ids=["unk", "byte_fallback"])
def both(request, tmp_path_factory):
    """The same tokenizer, ours and as HF reads the file of ours."""
    directory = tmp_path_factory.mktemp("char")
    tok = train_bpe(TEXTS, 500, level="char", byte_fallback=request.param)
    tok.save(directory)
    return tok, HFTokenizer.from_file(str(directory / "tokenizer.json"))


@pytest.mark.parametrize("byte_fallback", [False, True])
@pytest.mark.parametrize("min_frequency", [1, 2, 4])
def test_vocabulary_merges_and_settings_are_those_of_hf(byte_fallback, min_frequency):
    ours = train_bpe(TEXTS, 600, min_frequency, "char", byte_fallback).to_dict()
    theirs = json.loads(hf_trained(TEXTS, 600, min_frequency, byte_fallback).to_str())
    assert ours["model"]["merges"]
    for part in ("merges", "vocab", "unk_token", "byte_fallback"):
        assert ours["model"][part] == theirs["model"][part]
    for part in ("normalizer", "pre_tokenizer", "decoder", "post_processor"):
        assert ours[part] == theirs[part]


@given(st.lists(st.text(st.sampled_from("ab 哈呀1!\n　"), max_size=30), min_size=1, max_size=6))
def test_random_texts_give_the_merges_of_hf(texts):
    assume(any(texts))
    assert (
        train_bpe(texts, 60, level="char").to_dict()["model"]["merges"]
        == (json.loads(hf_trained(texts, 60).to_str())["model"]["merges"])
    )


@given(text=any_text)
@example(text="")
@example(text="感冒了，要多喝 10 杯水吗？  no  \n")
@example(text="a [EOS] b[PAD]")
def test_ids_and_text_are_those_of_hf(both, text):
    tok, hf = both
    hf.encode_special_tokens = True
    assert tok.encode(text) == hf.encode(text).ids
    hf.encode_special_tokens = False
    ids = tok.encode(text, specials=True)
    assert ids == hf.encode(text).ids
    assert tok.decode(ids) == hf.decode(ids, skip_special_tokens=False)


@given(text=any_text)
def test_byte_fallback_loses_nothing_but_width(text):
    """The original's pipeline put a space before every piece.

    It decoded 你好，世界123。 to 你好 , 世界 1 2 3 。
    """
    tok = train_bpe(TEXTS, 500, level="char", byte_fallback=True)
    assert tok.decode(tok.encode(text)) == unicodedata.normalize("NFKC", text).replace("▁", " ")


def test_an_unknown_character_is_unk():
    tok = train_bpe(TEXTS, 500, level="char")
    assert tok.decode(tok.encode("感冒鱻，月光123。")) == "感冒[UNK],月光123。"
    assert tok.encode("鱻鱻") == [tok.special_id("[UNK]")] * 2


def test_save_load_and_auto_tokenizer(both, tmp_path):
    from transformers import AutoTokenizer

    tok, _ = both
    tok.save(tmp_path)
    again, auto = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert again.fingerprint == tok.fingerprint
    assert (len(auto), auto.eos_token_id, auto.unk_token_id) == (len(tok), 1, 6)
    for text in [*TEXTS, "鱻 Ａ１ 😀"]:
        assert again.encode(text) == auto(text).input_ids == tok.encode(text)
        assert auto.decode(tok.encode(text)) == tok.decode(tok.encode(text))
    messages = [{"role": "user", "content": " 感冒了要怎么办？"}]
    assert auto.apply_chat_template(messages, return_dict=False) == chat_prompt(messages, tok)


def test_added_tokens_are_found_in_normalized_text(both, tmp_path):
    """As HF has it: one may type an added token at full width."""
    both[0].save(tmp_path)
    tok, hf = Tokenizer.load(tmp_path), HFTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    new = ["<工具>", "Ｑ键", "感"]
    assert tok.add_tokens(new) == hf.add_tokens(new)
    for text in ("请用<工具>查 Q键 和 Ｑ键", "＜工具＞感冒[EOS]"):
        assert tok.encode(text, specials=True) == hf.encode(text).ids


def test_mistakes(tmp_path):
    with pytest.raises(
        UserError, match="vocab_size 50 is too small: the special tokens and the characters of this"
    ):
        train_bpe(TEXTS, 50, level="char")
    with pytest.raises(UserError, match="level 'word'"):
        train_bpe(TEXTS, 300, level="word")
    with pytest.raises(UserError, match="split 'cl100k' is not known; there are gpt2, qwen2"):
        train_bpe(TEXTS, 300, split="cl100k")
    with pytest.raises(UserError, match="byte fallback is for the level 'char'"):
        train_bpe(TEXTS, 300, byte_fallback=True)
    hf = hf_trained(TEXTS, 500)
    hf.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), pre_tokenizers.Metaspace()]
    )
    hf.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="splits otherwise than gpt2, qwen2, or the char level"):
        Tokenizer.load(tmp_path)
