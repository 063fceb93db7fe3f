"""One row of the table makes one more schema work in every command."""

import json

import pytest

import sft
from nanophi.cli import UserError
from nanophi.text import clean, corpus, dedup, schemas, stats
from nanophi.text.corpus import Skipped, read_rows, read_texts, write_rows
from nanophi.text.schemas import SCHEMAS, Schema, messages_of, preference_of, text_of, texts_of

QA = Schema(asked=("ask",), answers=("tell",))
ROWS = [
    {"ask": "天为什么是蓝的", "tell": "因为空气把蓝光散射得更多", "id": 1},
    {"ask": "１加１等于几", "tell": "等于２", "id": 2},
]


@pytest.fixture
def question_answer(monkeypatch):
    monkeypatch.setitem(SCHEMAS, "ask/tell", QA)


def test_a_schema_from_outside_is_read_and_prepared(question_answer, tmp_path, tok):
    path = tmp_path / "qa.jsonl"
    write_rows(path, ROWS)
    assert list(read_rows([path])) == ROWS
    assert messages_of(ROWS[1]) == [
        {"role": "user", "content": "１加１等于几"},
        {"role": "assistant", "content": "等于２"},
    ]
    assert texts_of(ROWS[1]) == ["１加１等于几", "等于２"]
    assert list(read_texts([path]))[1] == "１加１等于几\n等于２"
    data = sft.pack([str(path)], tok, context=200, batch_rows=1, seed=0, bos=False)
    assert data.steps_per_epoch > 0


def test_a_schema_from_outside_is_cleaned(question_answer, tmp_path):
    """The question gets no final full stop, the answer does."""
    raw = tmp_path / "raw.jsonl"
    out = tmp_path / "clean.jsonl"
    write_rows(raw, ROWS)
    clean.main(clean.Config(input=[str(raw)], out=str(out)))
    assert list(read_rows([out])) == [
        {"ask": "天为什么是蓝的", "tell": "因为空气把蓝光散射得更多。", "id": 1},
        {"ask": "1加1等于几", "tell": "等于2", "id": 2},
    ]


def test_a_schema_from_outside_goes_through_the_other_commands(question_answer, tmp_path):
    raw = str(tmp_path / "raw.jsonl")
    write_rows(raw, [*ROWS, ROWS[0]])
    out = str(tmp_path / "unique.jsonl")
    assert dedup.main(dedup.Config(input=[raw], out=out))["written"] == 2
    text = str(tmp_path / "texts.txt")
    assert corpus.main(corpus.Config(input=[raw], out=text)) == 3
    groups = stats.main(stats.Config(input=[raw]))
    assert [len(group.lengths) for group in groups.values()] == [3]


def test_a_schema_from_outside_is_checked(question_answer, tmp_path):
    path = tmp_path / "bad.jsonl"
    rows = [{"ask": 5, "tell": "五"}, {"text": "", "ask": "几", "tell": "五"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    skipped = Skipped()
    assert list(read_rows([path], on_bad=skipped)) == [{"ask": "几", "tell": "五"}]
    assert "bad.jsonl, line 1: 'ask' should be a string, not '5'" in skipped.first[0]
    with pytest.raises(UserError, match=r"keys ask is no conversation.*ask and tell"):
        messages_of({"ask": "几"})


def test_without_the_row_the_schema_is_unknown(tmp_path):
    path = tmp_path / "qa.jsonl"
    write_rows(path, ROWS)
    known = "messages, conversations, instruction and output, prompt and response; or text"
    with pytest.raises(UserError, match=f"line 1: a row with the keys ask, .*{known}"):
        list(read_rows([path], use=messages_of))


def test_other_kinds_from_outside(monkeypatch, tmp_path):
    monkeypatch.setitem(SCHEMAS, "headline/body", Schema(document=("headline", "body")))
    monkeypatch.setitem(SCHEMAS, "dialog", Schema(turns="dialog", speaker="name", content="words"))
    monkeypatch.setitem(
        SCHEMAS, "question/good/bad", Schema(asked=("question",), compared=("good", "bad"))
    )
    monkeypatch.setitem(schemas.ROLES, "客服", "assistant")
    rows = [
        {"headline": "立春", "body": "今天立春。"},
        {"dialog": [{"name": "user", "words": "在吗"}, {"name": "客服", "words": "在的"}]},
        {"question": "在吗", "good": "在的。", "bad": "不"},
    ]
    path = tmp_path / "a.jsonl"
    write_rows(path, rows)
    document, dialog, pair = read_rows([path])
    assert document == {"text": "立春\n今天立春。"}
    assert [m["role"] for m in messages_of(dialog)] == ["user", "assistant"]
    assert preference_of(pair) == ("在吗", "在的。", "不")
    assert text_of(pair) == "在吗\n在的。\n不"
    cleaned = clean.clean_row(dialog)
    assert cleaned["dialog"][1] == {"name": "客服", "words": "在的。"}


def test_a_row_of_several_schemas(tmp_path):
    """A document first, then a preference pair, then turns, then one question and its answer."""
    turns = [{"role": "user", "content": "问"}]
    row = {"prompt": "甲", "response": "乙", "input": "丙"}
    assert messages_of(row)[0]["content"] == "甲\n丙"
    row |= {"instruction": "丁", "output": "戊"}
    assert messages_of(row)[1]["content"] == "戊"
    row |= {"messages": turns}
    assert messages_of(row) == turns
    row |= {"chosen": "己", "rejected": "庚"}
    assert texts_of(row) == ["甲", "己", "庚"]
    assert messages_of(row) == turns
    row |= {"text": "辛"}
    assert texts_of(row) == ["辛"]
    with pytest.raises(UserError, match="a preference pair needs prompt too; this row has chosen"):
        texts_of({"chosen": "己", "rejected": "庚"})


def test_a_schema_that_says_nothing_is_refused():
    with pytest.raises(AssertionError, match="keys are a tuple"):
        Schema(asked=("question",), answers="answer")
    with pytest.raises(AssertionError, match="document, answers, compared or turns"):
        Schema(asked=("question",))
