"""The embedded corpus keeps the promises of data/demo/README.md."""

from collections import Counter
from pathlib import Path
from statistics import median

import pytest

from nanophi.infer.rag import NOT_FOUND, QUESTION
from nanophi.text.clean import clean
from nanophi.text.corpus import read_rows
from nanophi.text.schemas import messages_of, preference_of, texts_of

DATA = Path(__file__).resolve().parents[1] / "data" / "demo"


def rows(name: str) -> list[dict]:
    return list(read_rows([DATA / f"{name}.jsonl"]))


def grams(text: str, n: int) -> set[str]:
    return {text[i : i + n] for i in range(len(text) - n + 1)}


def trained_questions() -> list[str]:
    conversations = [messages_of(row) for name in ("sft", "rephrased") for row in rows(name)]
    return [m["content"] for messages in conversations for m in messages if m["role"] == "user"]


def test_documents_are_many_long_and_different():
    documents = [clean(text) for row in rows("documents") for text in texts_of(row)]
    assert len(documents) >= 250
    assert sum(map(len, documents)) >= 60_000
    assert min(map(len, documents)) >= 80
    shingles = [grams(document, 5) for document in documents]
    alike = [
        (a, b)
        for a in range(len(shingles))
        for b in range(a)
        if len(shingles[a] & shingles[b]) > 0.1 * min(len(shingles[a]), len(shingles[b]))
    ]
    assert len(alike) == 8  # the planted copies


def test_conversations():
    conversations = [messages_of(row) for row in rows("sft")]
    answers = [
        m["content"] for messages in conversations for m in messages if m["role"] == "assistant"
    ]
    assert len(conversations) >= 150
    assert sum(len(messages) == 4 for messages in conversations) >= 15
    assert sum("背景：" in messages[0]["content"] for messages in conversations) >= 15
    found = [answer for answer in answers if "未找到相关答案" not in answer]
    assert min(map(len, found)) >= 30
    assert max(map(len, found)) <= 150
    assert median(map(len, found)) >= 60
    assert len(set(found)) == len(found)


def test_rephrased_questions_have_a_taught_answer_each():
    taught = {messages_of(row)[1]["content"] for row in rows("sft")}
    rephrased = [messages_of(row) for row in rows("rephrased")]
    assert {messages[1]["content"] for messages in rephrased} <= taught
    assert max(Counter(messages[1]["content"] for messages in rephrased).values()) <= 3
    questions = trained_questions()
    assert len(set(questions)) == len(questions)


def test_preference_pairs():
    pairs = [preference_of(row) for row in rows("dpo")]
    assert len(pairs) >= 60
    assert all(chosen != rejected for _, chosen, rejected in pairs)
    assert len({row["prompt"] for row in rows("dpo")}) == len(pairs)


def test_length_does_not_tell_which_answer_is_better():
    """The chosen answer was once the longer one in all 64 pairs. Such pairs teach a model to talk
    more. Now about half of the chosen answers are the shorter ones: terse and right, beside long
    answers that evade the question or are wrong.
    """
    gaps = [len(row["chosen"]) - len(row["rejected"]) for row in rows("dpo")]
    longer = sum(gap > 0 for gap in gaps) + sum(gap == 0 for gap in gaps) / 2
    assert 0.45 <= longer / len(gaps) <= 0.55


@pytest.mark.parametrize("row", rows("heldout"), ids=lambda row: row["question"])
def test_held_out_question_is_in_other_words(row):
    own = grams(row["question"], 2)
    assert max(len(own & grams(question, 2)) for question in trained_questions()) <= len(own) / 2
    assert (row["rephrases"], row["output"]) in {
        (messages[0]["content"], messages[1]["content"])
        for messages in map(messages_of, rows("sft"))
    }


def test_there_are_twenty_of_them():
    assert len(rows("heldout")) == 20


# ---- reading


def background_and_question(row: dict) -> tuple[str, str]:
    before, question = row["instruction"].split("\n问题：")
    background = before.split("\n背景：")[1]
    assert row["instruction"] == QUESTION.format(background=background, question=question)
    return background, question


def test_only_reading_tells_the_answers_apart():
    """A passage has several questions with answers of its own."""
    read = [(*background_and_question(row), row["output"]) for row in rows("reading")]
    answers = Counter(background for background, _, _ in read)
    assert len(read) == len({(background, question) for background, question, _ in read}) == 200
    assert min(answers.values()) >= 2
    told = [(background, answer) for background, _, answer in read if answer != NOT_FOUND]
    assert len(told) == len(set(told)) == 170


def test_answers_are_words_of_the_passage():
    for row in rows("reading"):
        background, _ = background_and_question(row)
        pairs = grams(row["output"], 2)
        if row["output"] != NOT_FOUND:
            assert len(pairs & grams(background, 2)) >= 0.7 * len(pairs), row["output"]


def test_held_out_passages_are_others():
    taught = [background_and_question(row) for row in rows("reading")]
    held_out = rows("reading-heldout") + rows("reading-development")
    assert len(held_out) == 40
    for row in held_out:
        assert all(key in row["output"] for key in row["keys"])
        for background, question in taught:
            mine, theirs = grams(row["background"], 2), grams(background, 2)
            assert len(mine & theirs) <= 0.1 * len(mine)
            mine, theirs = grams(row["question"], 2), grams(question, 2)
            assert len(mine & theirs) <= 0.4 * len(mine)
