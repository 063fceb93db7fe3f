"""tokenizer.json: special tokens that were added, roles, and the template."""

import json

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as HFTokenizer

from nanophi.cli import UserError
from nanophi.tokenizer import tokenizer
from nanophi.tokenizer.bpe import train_bpe
from nanophi.tokenizer.tokenizer import SPECIAL_TOKENS, Tokenizer
from tests.conftest import TEXTS

MARKS = ["<|im_start|>", "<|im_end|>"]


def read_json(path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def marked():
    """A tokenizer with two more special tokens."""
    tok = train_bpe(TEXTS, 400)
    assert tok.add_tokens(MARKS, special=True) == 2
    return tok


def test_added_special_tokens_are_recognised_only_with_specials(marked, tmp_path, monkeypatch):
    text = "<|im_start|>感冒了<|im_end|>"
    start, end = (marked.special_id(mark) for mark in MARKS)
    assert (start, end, len(marked)) == (400, 401, 402)
    assert marked.specials == {*SPECIAL_TOKENS, *MARKS}
    assert not {start, end} & set(marked.encode(text))
    ids = marked.encode(text, specials=True)
    assert ids == [start, *marked.encode("感冒了"), end]
    assert marked.decode(ids, skip_special_tokens=True) == "感冒了"
    assert marked.byte_lengths()[start] == 0
    marked.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.fingerprint == marked.fingerprint
    assert loaded.specials == marked.specials
    hf = HFTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for mine in (marked, loaded):
        assert mine.encode(text, specials=True) == hf.encode(text).ids
    entry = read_json(tmp_path / "tokenizer.json")["added_tokens"][-1]
    assert (entry["content"], entry["special"], entry["normalized"]) == ("<|im_end|>", True, False)
    monkeypatch.setattr(tokenizer, "FEW_CHARACTERS", 0)
    assert marked.encode_batch([text], specials=True) == [ids]


def test_a_token_that_was_added_before_can_become_special():
    tok = train_bpe(TEXTS, 400)
    tok.add_tokens(MARKS)
    assert tok.encode(MARKS[0]) == [400]
    assert tok.add_tokens(MARKS, special=True) == 0
    assert tok.encode(MARKS[0]) != [400]
    assert tok.add_tokens(MARKS) == 0  # a special token stays special
    assert tok.encode(MARKS[0], specials=True) == [400]


@pytest.mark.parametrize("options", [{}, {"level": "char", "byte_fallback": True}])
def test_a_special_token_that_merging_also_makes_survives_saving(options, tmp_path):
    """Such a token was dropped from the vocabulary when the file was read: the merges lacked it."""
    tok = train_bpe(TEXTS, 600, **options)
    product = tok.spelling[tok.merges[tok.merge_list[0]][1]]
    new = [product, "a", "感"]
    tok.add_tokens(new, special=True)
    tok.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.fingerprint == tok.fingerprint
    hf = HFTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in [*TEXTS, "aa感" + product]:
        hf.encode_special_tokens = True
        assert loaded.encode(text) == tok.encode(text) == hf.encode(text).ids
        hf.encode_special_tokens = False
        assert loaded.encode(text, specials=True) == hf.encode(text).ids


def test_special_tokens_that_hf_adds_are_read(tmp_path):
    tok = train_bpe(TEXTS, 400)
    tok.save(tmp_path)
    hf = HFTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    hf.add_special_tokens([AddedToken(mark, special=True) for mark in MARKS])
    hf.save(str(tmp_path / "tokenizer.json"))
    tok.add_tokens(MARKS, special=True)
    assert Tokenizer.load(tmp_path).fingerprint == tok.fingerprint


def test_roles_are_those_of_the_seven_tokens_and_the_templates_stop(marked, tmp_path):
    """A template of <|im_start|> once gave the role "<|im_start|>_token"."""
    marked.save(tmp_path)
    roles = read_json(tmp_path / "special_tokens_map.json")
    assert list(roles.values()) == SPECIAL_TOKENS
    marked.template = "chatml"
    marked.save(tmp_path)
    expected = roles | {"eos_token": "<|im_end|>"}
    assert read_json(tmp_path / "special_tokens_map.json") == expected
    config = read_json(tmp_path / "tokenizer_config.json")
    assert {name: config[name] for name in expected} == expected
    assert Tokenizer.load(tmp_path).template == "chatml"

    from transformers import AutoTokenizer

    auto = AutoTokenizer.from_pretrained(tmp_path)
    assert (auto.eos_token, auto.eos_token_id) == ("<|im_end|>", 401)
    assert auto("<|im_start|>感冒").input_ids == marked.encode("<|im_start|>感冒", specials=True)


@pytest.mark.parametrize("pattern", [None, "x", {"String": " "}, {"Regex": ["a"]}])
def test_a_damaged_split_is_refused(pattern, tmp_path):
    data = train_bpe(TEXTS, 400, split="qwen2").to_dict()
    data["pre_tokenizer"]["pretokenizers"][0]["pattern"] = pattern
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(UserError, match=r"this pre_tokenizer .* splits otherwise"):
        Tokenizer.load(tmp_path)
