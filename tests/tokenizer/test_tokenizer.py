"""Encoding and decoding: HF's ids, nothing lost, specials only where asked for."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer

from nanophi.cli import UserError
from nanophi.tokenizer.bpe import train_bpe
from nanophi.tokenizer.chat import chat_prompt, encode_chat
from nanophi.tokenizer.tokenizer import SPECIAL_TOKENS, Tokenizer
from tests.conftest import TEXTS


@pytest.fixture(scope="module")
def hf(tok, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tok")
    tok.save(directory)
    return HFTokenizer.from_file(str(directory / "tokenizer.json"))


any_text = st.text() | st.text(
    st.sampled_from("感冒了要多喝水，。？\n\t  a'st1[EOS]😀鱻\u200b"), max_size=60
)


@given(text=any_text)
@example(text="")
@example(text="don't  it's 3.14\n\n  x \n")
@example(text="a [EOS] b[PAD]")
def test_ids_are_those_of_hf(tok, hf, text):
    hf.encode_special_tokens = True
    assert tok.encode(text) == hf.encode(text).ids
    hf.encode_special_tokens = False
    assert tok.encode(text, specials=True) == hf.encode(text).ids


@given(text=any_text)
@example(text="感冒😀了 鱻")
def test_offsets_are_those_of_hf(tok, hf, text):
    hf.encode_special_tokens = True
    ids, offsets = tok.encode_with_offsets(text)
    assert (ids, offsets) == (hf.encode(text).ids, hf.encode(text).offsets)


@given(text=any_text)
def test_nothing_is_lost(tok, text):
    """The original's vocabulary lacked bytes unseen in training: 感冒A😀 came back as 感冒�."""
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert tok.decode_bytes(ids) == text.encode()


@given(ids=st.lists(st.integers(0, 399), max_size=30))
def test_decoding_is_that_of_hf(tok, hf, ids):
    assert tok.decode(ids) == hf.decode(ids, skip_special_tokens=False)
    assert tok.decode(ids, skip_special_tokens=True) == hf.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    "text", [" " * 10_000, "哈" * 10_000, "a" * 10_000, "\n" * 10_000, "。" * 10_000]
)
def test_long_runs_are_no_trap(tok, hf, text):
    """Merging by scanning for the best pair each time is quadratic in a pre-token's length."""
    assert tok.encode(text) == hf.encode(text).ids


def test_an_id_that_is_no_token_is_named(tok):
    with pytest.raises(UserError, match="no token has the id 400; the largest is 399"):
        tok.decode([5, 400])
    with pytest.raises(ValueError, match="no token has the id -1"):
        tok.decode_bytes([-1])


def test_one_text_and_many_are_not_mistaken_for_each_other(tok):
    """To Python a string is also a list of texts, one for each character."""
    for value in (123, None, ["感冒"], b"a"):
        with pytest.raises(UserError, match=r"encode takes one string, .*; encode_batch takes a"):
            tok.encode(value)
    with pytest.raises(UserError, match="encode_batch takes a list of strings"):
        tok.encode_batch("感冒")
    with pytest.raises(UserError, match="add_tokens takes a list of strings"):
        tok.add_tokens("<工具>")


def test_repr_informs():
    tok = train_bpe(TEXTS, 400, split="qwen2")
    tok.add_tokens(["<工具>"])
    shown = repr(tok)
    for part in (
        "401 tokens",
        "ByteLevel(split='qwen2'",
        "'wenda'",
        "8 special",
        "[EOS]",
        "<工具>",
    ):
        assert part in shown
    tok.add_tokens([f"<{i}>" for i in range(500)])
    assert len(repr(tok)) < 400


def test_special_ids_are_the_originals(tok):
    assert [tok.special_id(name) for name in SPECIAL_TOKENS] == list(range(7))
    assert tok.encode("[EOS]") != [1]
    assert tok.encode("[EOS]", specials=True) == [1]
    assert len(tok) == 400


def test_save_and_load(tok, tmp_path):
    tok.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.to_dict() == tok.to_dict()
    assert again.fingerprint == tok.fingerprint
    assert again.encode_batch(TEXTS) == tok.encode_batch(TEXTS)


def test_added_tokens_are_recognised_everywhere_and_by_hf(tmp_path):
    tok = train_bpe(TEXTS, vocab_size=300)
    before = tok.fingerprint
    assert tok.add_tokens(["<工具>", "<工具>", "[EOS]"]) == 1
    assert len(tok) == 301
    assert tok.fingerprint != before
    text = "请用<工具>查一下"
    assert tok.encode(text)[-4:] != tok.encode("<工具>") == [300]
    assert 300 in tok.encode(text)
    assert tok.decode(tok.encode(text)) == text
    tok.save(tmp_path)
    assert HFTokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids == tok.encode(
        text
    )
    assert Tokenizer.load(tmp_path).encode(text) == tok.encode(text)


def test_adding_what_is_a_token_keeps_its_id(hf, tok, tmp_path):
    """It once got a second id, and the saved tokenizer could not be loaded again."""
    tok.save(tmp_path)
    ours, theirs = Tokenizer.load(tmp_path), HFTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    new = ["a", "aa", "", "x", "a[EOS]", "感"]
    assert ours.add_tokens(new) == theirs.add_tokens(new)
    assert len(ours) == theirs.get_vocab_size()
    ours.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    for text in ("aaa感x aa[EOS]b", "a[EOS]a[EOS]"):
        assert (
            ours.encode(text, specials=True)
            == again.encode(text, specials=True)
            == theirs.encode(text).ids
        )
        assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalizer": {"type": "NFKC"}}, 'the normalizer {"type": "NFKC"} is not supported'),
        (
            {"pre_tokenizer": {"type": "Whitespace"}},
            "a model BPE with pre_tokenizer Whitespace is not read",
        ),
        (
            {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
            "this pre_tokenizer .* splits otherwise",
        ),
        (
            {"post_processor": {"type": "TemplateProcessing"}},
            "the post_processor TemplateProcessing",
        ),
    ],
)
def test_settings_that_would_give_other_ids_are_refused(tok, tmp_path, changes, message):
    tok.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(
        json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8"
    )
    with pytest.raises(UserError, match=message):
        Tokenizer.load(tmp_path)


def changed(data, path, value):
    """A copy of nested dicts with `value` at `path`; if `value` is `...`, the entry is missing."""
    copy = json.loads(json.dumps(data))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return copy


ODD = [
    ...,
    None,
    5,
    "x",
    [],
    {},
    [None],
    [[]],
    [["a"]],
    ["a b c"],
    {"a": None},
    {"a": -1},
    {"a": 1.5},
    {"a": 10**30},
]


@pytest.mark.parametrize("level", ["byte", "char"])
@pytest.mark.parametrize(
    "path",
    [
        ("model",),
        ("added_tokens",),
        ("pre_tokenizer",),
        ("normalizer",),
        ("post_processor",),
        ("model", "vocab"),
        ("model", "merges"),
        ("model", "type"),
        ("added_tokens", 0),
        ("added_tokens", 0, "id"),
        ("added_tokens", 0, "content"),
        ("added_tokens", 0, "special"),
        ("pre_tokenizer", "pretokenizers"),
    ],
    ids=str,
)
def test_a_damaged_file_is_one_clear_error_or_a_tokenizer(path, level, tmp_path):
    """There were seventy kinds of traceback."""
    data = train_bpe(TEXTS, 500, level=level).to_dict()
    if path[-1] == "pretokenizers" and level == "byte":
        return
    for value in ODD:
        (tmp_path / "tokenizer.json").write_text(
            json.dumps(changed(data, path, value)), encoding="utf-8"
        )
        try:
            Tokenizer.load(tmp_path).encode_batch(TEXTS)
        except UserError:
            continue
    for text in ("null", "[]", "[" * 100_000, ""):
        (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=r"tokenizer\.json is (no|damaged)"):
            Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("model", "fuse_unk"), True),
        (("model", "continuing_subword_prefix"), "##"),
        (("model", "dropout"), 0.5),
        (("truncation",), {"max_length": 2}),
        (("padding",), {"length": 9}),
        (("added_tokens", 1, "normalized"), True),
    ],
    ids=str,
)
def test_settings_that_would_change_ids_are_refused(path, value, tmp_path):
    data = train_bpe(TEXTS, 500, level="char").to_dict()
    (tmp_path / "tokenizer.json").write_text(
        json.dumps(changed(data, path, value)), encoding="utf-8"
    )
    with pytest.raises(UserError, match=f"the settings {path[-1]} are not supported"):
        Tokenizer.load(tmp_path)


def test_an_added_stand_in_character_leaves_other_texts_alone(tmp_path):
    """ "é" is also how byte 0xE9 is spelled: once added, 鑑 (E9 91 91) came back damaged."""
    tok = train_bpe(TEXTS, 400)
    tok.add_tokens(["é"])
    assert tok.decode(tok.encode("鑑")) == "鑑"


def test_ids_with_gaps(tmp_path):
    """A file from elsewhere may have [EOS] at 1000.

    A new token then gets 1001, and shards must hold such ids.
    """
    data = train_bpe(TEXTS, 400).to_dict()
    del data["model"]["vocab"]["[EOS]"]
    data["added_tokens"][1]["id"] = 1000
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    tok = Tokenizer.load(tmp_path)
    assert (len(tok), tok.eos_id) == (1001, 1000)
    assert tok.add_tokens(["<工具>"]) == 1
    assert tok.encode("<工具>") == [1001]
    assert tok.decode([1001, *tok.encode("感冒")]) == "<工具>感冒"
    assert len(tok.byte_lengths()) == 1002


def test_fingerprint_survives_saving_after_tokens_were_added(tmp_path):
    tok = train_bpe(TEXTS, 400)
    tok.add_tokens(["zz", "a"])  # "a" has a smaller id than "zz"
    tok.save(tmp_path)
    assert Tokenizer.load(tmp_path).fingerprint == tok.fingerprint


def test_adding_is_all_or_nothing():
    tok = train_bpe(TEXTS, 400)
    with pytest.raises(UserError, match="half of a surrogate pair"):
        tok.add_tokens(["好的", "\ud800"])
    assert len(tok) == 400


def test_auto_tokenizer_gives_the_same_ids_and_template(tok, tmp_path):
    from transformers import AutoTokenizer

    tok.save(tmp_path)
    auto = AutoTokenizer.from_pretrained(tmp_path)
    assert len(auto) == len(tok)
    assert (auto.eos_token_id, auto.pad_token_id, auto.bos_token_id) == (1, 0, 3)
    for text in TEXTS:
        assert auto(text).input_ids == tok.encode(text)
        assert auto.decode(tok.encode(text)) == text
    messages = [
        {"role": "system", "content": "你是助手。"},
        {"role": "user", "content": "感冒了要怎么办？"},
        {"role": "assistant", "content": " 多喝水。\n"},
        {"role": "user", "content": "  还有呢？\n"},
    ]
    assert auto.apply_chat_template(messages, return_dict=False) == chat_prompt(messages, tok)
    messages.append({"role": "assistant", "content": "\n\n 好好休息。"})
    assert auto.apply_chat_template(messages, return_dict=False) == encode_chat(messages, tok)[0]


def test_loading_something_else_is_a_clear_error(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    from tokenizers import models

    HFTokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")).save(
        str(tmp_path / "tokenizer.json")
    )
    with pytest.raises(UserError, match="a model WordPiece with pre_tokenizer None is not read"):
        Tokenizer.load(tmp_path)


def test_byte_lengths_count_text_only(tok):
    lengths = tok.byte_lengths()
    assert lengths[tok.eos_id] == 0
    text = "感冒了"
    assert sum(lengths[i] for i in tok.encode(text)) == 9
