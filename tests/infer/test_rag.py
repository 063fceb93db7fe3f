"""Passages by the model's tokens, BM25 by hand, and an answer only where a passage gives one."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanophi.cli import UserError
from nanophi.columns import display_width, side_by_side, wrap
from nanophi.infer.chat_modes import chatting, comparing, converse, retrieving
from nanophi.infer.rag import (
    BM25,
    NOT_FOUND,
    Index,
    build_index,
    cut_passages,
    grams,
    question_with,
)
from nanophi.text.corpus import read_rows
from nanophi.text.schemas import messages_of
from nanophi.tokenizer.chat import chat_prompt


@given(
    text=st.text(st.sampled_from("感冒了要多喝水。\n春天来ab "), max_size=200),
    size=st.integers(12, 40),
)
def test_passages_are_small_and_lose_nothing(tok, text, size):
    passages = cut_passages(text, tok, size, overlap=4)
    assert all(len(tok.encode(part)) <= size for part in passages)
    # Each passage stands in the text; between two passages there is only white space.
    for part in passages:
        assert part in text
    assert set("".join(text.split())) == set("".join("".join(passages).split()))
    assert sum(len("".join(part.split())) for part in passages) >= len("".join(text.split()))


def test_passages_end_at_sentences_where_they_can(tok):
    text = "感冒了要多喝水。好好休息。发烧超过三天。应该去看医生。\n\n春天来了。小草发芽。"
    size = len(tok.encode("感冒了要多喝水。好好休息。")) + 1
    assert all(part.endswith("。") for part in cut_passages(text, tok, size, overlap=0))


def test_grams():
    assert grams("感冒了，AI") == ["感", "冒", "了", "感冒", "冒了", "a", "i", "ai"]


def test_bm25_by_hand():
    """Two texts of 1 and 3 grams. The question 甲丁 has 3 grams, and one of them is in a text.

    All grams weigh the same here.
    """
    scores = BM25(["甲", "乙丙"]).scores("甲丁")
    idf = math.log(1 + (2 - 1 + 0.5) / 1.5)
    expected = idf * 1 * 2.2 / (1 + 1.2 * (1 - 0.75 + 0.75 * 1 / 2)) / (3 * idf * 2.2)
    assert scores == pytest.approx({0: expected})


def test_a_passage_gains_from_its_document(tok):
    """Both have a passage on 高度; only the document says which mountain it is about."""
    filler = "这里风景很好，每年都有许多人来。"
    documents = [
        (name, f"{name}是一座名山。{filler * 3}\n它的高度是一千米。") for name in ("泰山", "华山")
    ]
    index = Index(documents, tok, size=60)
    score, best = index.search("华山的高度是多少？")[0]
    assert best.source == "华山"
    assert 0 < score <= 1


DOCUMENTS = [
    "月亮本身不发光，它反射的是太阳的光。",
    "感冒多由病毒引起，要多喝温水，好好休息。",
    "黄河的水里有许多泥沙。",
]


@pytest.fixture
def index(tok, tmp_path):
    for number, text in enumerate(DOCUMENTS):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    return build_index([str(tmp_path)], tok)


def test_the_right_document_is_found(index):
    for question, source in (
        ("月亮为什么会发光？", "0.txt #1"),
        ("感冒了要怎么办？", "1.txt #1"),
        ("黄河的水黄吗", "2.txt #1"),
    ):
        score, best = index.search(question)[0]
        assert best.source == source
        assert 0 < score <= 1
    assert index.search("！？") == []
    assert index.search("今晚吃饺子")[:1] == [] or index.search("今晚吃饺子")[0][0] < 0.17


def test_background_goes_into_the_question_and_sources_are_named(index, tok, capsys):
    said = []
    reply = retrieving(lambda ids: said.append(ids) or "", tok, index, passages=1, threshold=0.17)
    reply("月亮为什么会发光？")
    found = index.search("月亮为什么会发光？", 1)
    assert said == [chat_prompt(question_with(found, "月亮为什么会发光？"), tok)]
    assert DOCUMENTS[0] in tok.decode(said[0])
    assert "0.txt #1" in capsys.readouterr().err
    reply("ABBA XYZZY?")
    assert len(said) == 1  # the model was not asked
    printed = capsys.readouterr()
    assert printed.out == NOT_FOUND + "\n"
    assert "is below the threshold 0.17" in printed.err


def test_nothing_to_answer_from_is_said(tok, tmp_path):
    (tmp_path / "empty.txt").write_text("\n", encoding="utf-8")
    with pytest.raises(UserError, match="no text to answer from"):
        build_index([str(tmp_path)], tok)


def test_chat_remembers_as_many_turns_as_asked_for_and_fit(tok):
    asked = []

    def say(ids):
        asked.append(tok.decode(ids))
        return "好。"

    for history, expected in ((0, [1, 1, 1]), (1, [1, 2, 2]), (5, [1, 2, 3])):
        asked.clear()
        reply = chatting(say, tok, context=1000, history=history)
        for question in ("一？", "二？", "三？"):
            reply(question)
        assert [text.count("##提问:") for text in asked] == expected
    asked.clear()
    one = len(chat_prompt("一？", tok))
    reply = chatting(say, tok, context=2 * one, history=5)
    for question in ("一？", "二？", "三？"):
        reply(question)
    assert [text.count("##提问:") for text in asked] == [1, 1, 1]


def test_terminal_commands(tmp_path, monkeypatch, capsys):
    def start():
        said = []

        def reply(question):
            if question == "停":
                raise KeyboardInterrupt
            if question == "长":
                raise UserError("too long: shorten it")
            said.append(question)
            return f"{question}，第{len(said)}句。"

        return reply

    path = tmp_path / "chat.jsonl"
    lines = iter(
        [
            "甲",
            "",
            "停",
            "长",
            "乙",
            f"/save {path}",
            "/reset",
            "丙",
            f"/save {path}/x.jsonl",
            "/exit",
            "丁",
        ]
    )
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    converse(start)
    printed = capsys.readouterr().out
    assert "[stopped]" in printed  # Ctrl-C stops the answer, and the chat goes on
    assert "too long: shorten it" in printed
    assert "saved 2 turns" in printed
    assert next(lines) == "丁"
    (row,) = read_rows([path])
    assert [m["content"] for m in messages_of(row)] == ["甲", "甲，第1句。", "乙", "乙，第2句。"]


def test_columns_line_up_with_wide_characters(capsys):
    assert display_width("感冒a") == 5
    assert wrap("感冒了\nab", 4) == ["感冒", "了", "ab"]
    assert wrap("for x:\n    ok", 20) == ["for x:", "    ok"]  # an indented line stays so
    assert wrap("感冒 了", 4) == ["感冒", "了"]
    assert wrap("感冒了，快休息", 6) == ["感冒", "了，快", "休息"]
    table = side_by_side(["甲", "B"], ["感冒了要休息", "ok"], width=23)
    assert table.splitlines() == [
        "甲         | B",
        "---------- | ----------",
        "感冒了要休 | ok",
        "息         |",
    ]
    comparing({"x": lambda q: q + "一", "y": lambda q: q + "二"})("问")
    printed = capsys.readouterr().out
    assert "问一" in printed
    assert "问二" in printed


@pytest.mark.parametrize("there", ["corpus.jsonl", "config.json", "folder"])
def test_saving_a_chat_replaces_no_file(there, tmp_path, monkeypatch, capsys):
    """/save corpus.jsonl replaced a corpus of any size by one conversation."""
    path = tmp_path / there
    if there == "folder":
        path.mkdir()
    else:
        path.write_text('{"text": "一二三"}\n', encoding="utf-8")
    own = tmp_path / "own.jsonl"
    lines = [
        "/save",
        "甲",
        f"/save {path}",
        f"/save {own}",
        "乙",
        f"/save {own}",
        "/save a\0.jsonl",
    ]
    typed = iter([*lines, "/exit"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    converse(lambda: lambda question: "好。")
    printed = capsys.readouterr().out
    assert "there is nothing to save yet" in printed
    assert printed.count(there) == 1
    if there != "folder":
        assert path.read_text(encoding="utf-8") == '{"text": "一二三"}\n'
    (row,) = read_rows([own])  # what the chat has written itself it may write again
    assert len(messages_of(row)) == 4


def test_without_documents_nothing_is_found(tok, capsys):
    """With an empty index and the threshold 0 the model was asked without any background."""
    asked = []
    reply = retrieving(lambda ids: asked.append(ids) or "", tok, Index([], tok), 10**9, 0)
    assert reply("月亮为什么会发光？") == NOT_FOUND
    assert asked == []
    for passages, threshold in ((0, 0.2), (2, float("nan")), (2.5, 0.2), (2, "x")):
        with pytest.raises(UserError, match=r"(passages|threshold) is"):
            retrieving(lambda ids: "", tok, Index([], tok), passages, threshold)


@pytest.mark.parametrize("columns", ["0", "5", "x", "-3", "100000"])
def test_columns_in_a_terminal_of_any_width(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    table = side_by_side(["标题" * 500, ""], ["感冒了要休息", ""])
    assert table.replace("\n", "").replace(" ", "").count("标题") >= 1
    assert all(wrap("感冒，了", width) for width in (-1, 0, 1))
