"""Arguments of a wrong type or shape are refused with one line; they once ran silently."""

import numpy as np
import pytest
import torch

from nanophi.cli import UserError
from nanophi.tokenizer.bpe import train_bpe
from nanophi.tokenizer.chat import chat_prompt, encode_chat
from nanophi.tokenizer.elsewhere import load_ranks, train_sentencepiece
from nanophi.tokenizer.fast.words import count_words
from nanophi.tokenizer.levels import ByteLevel
from nanophi.tokenizer.report import report
from nanophi.tokenizer.tokenizer import Tokenizer
from tests.conftest import TEXTS


def entries(tok):
    """Each function that takes texts."""
    return {
        "train_bpe": lambda texts: train_bpe(texts, 300),
        "train_sentencepiece": lambda texts: train_sentencepiece(texts, 300),
        "count_words": lambda texts: count_words(texts, ByteLevel()),
        "encode_batch": tok.encode_batch,
        "add_tokens": tok.add_tokens,
        "report": lambda texts: report(tok, texts),
    }


@pytest.mark.parametrize("texts", ["一段很长的文字" * 10, b"abc", {"a": 1}, None, 5], ids=repr)
def test_what_is_no_list_of_texts_is_refused(tok, texts):
    """A string was taken as the list of its characters."""
    for name, function in entries(tok).items():
        with pytest.raises(UserError, match=f"{name} takes a list of strings"):
            function(texts)


@pytest.mark.parametrize("text", [1, None, b"x", ("a",)], ids=repr)
def test_a_text_that_is_no_string_is_named(tok, text):
    """These were TypeErrors from deep inside. A tuple of texts is fine, one of tuples is not."""
    kind = type(text).__name__
    for function in entries(tok).values():
        with pytest.raises(UserError, match=f"text number 2 is of type {kind}, a string was"):
            function(("一二三", text))


WRONG_NUMBERS = [float("nan"), 0, -3, 2.5, "300", True, None, [300]]


@pytest.mark.parametrize("number", WRONG_NUMBERS, ids=repr)
@pytest.mark.parametrize("name", ["vocab_size", "min_frequency"])
def test_numbers_of_a_training_are_whole(name, number):
    """min_frequency=nan trained for ever."""
    with pytest.raises(UserError, match=f"{name} is .*, expected a whole number of at least 1"):
        train_bpe(TEXTS, **{name: number})
    if name == "vocab_size":
        with pytest.raises(UserError, match=r"vocab_size is .*, expected a whole number"):
            train_sentencepiece(TEXTS, number)


def test_other_settings_of_a_training():
    assert len(train_bpe(TEXTS, np.int64(300))) == 300
    with pytest.raises(UserError, match=r"split \[\] is not known"):
        train_bpe(TEXTS, 300, split=[])
    with pytest.raises(UserError, match="level None is not known"):
        train_bpe(TEXTS, 300, level=None)
    with pytest.raises(UserError, match='byte_fallback is "no", expected true or false'):
        train_bpe(TEXTS, 300, byte_fallback="no")
    with pytest.raises(UserError, match=r"vocab_size .* is too large"):
        train_sentencepiece(TEXTS, 10**8)


@pytest.mark.parametrize("specials", [["<a>"], {"<a>": "5"}, {"<a>": -1}, {5: 5}, {"a": 9, "b": 9}])
def test_special_tokens_of_a_rank_file(specials):
    with pytest.raises(UserError, match="special"):
        load_ranks("is-not-read.tiktoken", specials=specials)


WRONG_IDS = [
    *("123", b"12", 5, None, 2.5, {"a": 1}, [[7, 8]], [7.0], ["7"], [None], [True], [-1]),
    *([10**6], [10**100], np.array([7.5]), np.array([[7]]), np.array(7), torch.tensor([7.0])),
]


@pytest.mark.parametrize("skip", [False, True])
def test_ids_that_are_none_are_refused(tok, skip):
    """ "123" was decoded as the ids 1, 2 and 3, and 7.9 as the id 7."""
    for ids in WRONG_IDS:
        with pytest.raises(UserError, match=r"decode takes a list|no token has the id"):
            tok.decode(ids, skip_special_tokens=skip)
        with pytest.raises(UserError, match=r"decode takes a list|no token has the id"):
            tok.decode_bytes(ids)


def test_ids_may_come_in_any_container(tok):
    ids = tok.encode("感冒了")
    arrays = [np.array(ids, kind) for kind in (np.int32, np.uint16, np.uint64)]
    for same in (*arrays, list(arrays[0]), torch.tensor(ids), list(torch.tensor(ids)), iter(ids)):
        assert tok.decode(same) == "感冒了"
    assert tok.decode([]) == tok.decode(np.array([], np.int64)) == ""


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "messages are of type NoneType, expected a list"),
        (5, "messages are of type int, expected a list"),
        ({"role": "user", "content": "你好"}, "messages are of type dict, expected a list"),
        ([], "no question"),
        (["你好"], "message 1 has no role"),
        ([None], "message 1 has no role"),
        ([{"role": "user"}], "has no content"),
        ([{"role": "user", "content": ["你好"]}], "has no content"),
        ([{"role": ["user"], "content": "你好"}], "message 1 has no role"),
        ([{"role": "x" * 10_000, "content": "你好"}], "message 1 is from .{,60}; user and"),
    ],
)
def test_what_is_no_conversation_is_refused(tok, messages, message):
    for function in (chat_prompt, encode_chat):
        with pytest.raises(UserError, match=message):
            function(messages, tok)


def test_other_arguments_of_a_tokenizer(tok, tmp_path):
    with pytest.raises(UserError, match="tok is of type NoneType, expected a Tokenizer"):
        chat_prompt("你好", None)
    with pytest.raises(UserError, match="messages are of type str"):
        encode_chat("你好", tok)
    for text in (3, None, ["[EOS]"]):
        with pytest.raises(UserError, match=r"special token is .*, expected a string"):
            tok.special_id(text)
    for directory in (None, 5, b"x", ["x"]):
        with pytest.raises(
            UserError, match=r"the directory of a tokenizer is .*, expected its path"
        ):
            Tokenizer.load(directory)
        with pytest.raises(
            UserError, match=r"the directory of a tokenizer is .*, expected its path"
        ):
            tok.save(directory)
