"""examples/lessons.py: rows of copying and of reading."""

import doctest
import json
from pathlib import Path

from examples import lessons
from nanophi.text.corpus import read_rows


def written(out: Path, seed: int = 0) -> dict[str, list[dict]]:
    out.mkdir(exist_ok=True)
    lessons.main(lessons.Config(out=str(out), copying=20, sentences=60, times=2, seed=seed))
    return {
        path.stem: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in sorted(out.iterdir())
    }


def test_examples_are_true():
    assert doctest.testmod(lessons).failed == 0


def test_the_same_seed_writes_the_same_rows(tmp_path):
    first = written(tmp_path / "a")
    assert first == written(tmp_path / "b")
    assert first["lessons"] != written(tmp_path / "c", seed=1)["lessons"]


def test_an_answer_is_the_sentence_in_the_prompt(tmp_path):
    rows = written(tmp_path)["lessons"][:60]
    for row in rows:
        background = row["instruction"].split("背景：", 1)[1].split("\n问题：")[0]
        assert row["output"] == background
    assert len({row["output"] for row in rows}) == 60  # no sentence comes twice


def test_copying_repeats_the_question(tmp_path):
    for row in written(tmp_path)["copying"]:
        assert (row["instruction"] * 12).startswith(row["output"])
        assert len(row["output"]) + len(row["instruction"]) == lessons.LONGEST


def test_other_questions_stand_in_the_lessons_several_times(tmp_path):
    others = list(read_rows([lessons.DATA / "sft.jsonl", lessons.DATA / "rephrased.jsonl"]))
    assert len(written(tmp_path)["lessons"]) == 60 + 2 * len(others)


def test_no_passage_that_is_held_out_is_taught():
    files = [lessons.DATA / f"reading-{name}.jsonl" for name in ("heldout", "development")]
    held_out = {row["background"] for row in read_rows(files)}
    taught = [row["instruction"] for row in read_rows([lessons.DATA / "reading.jsonl"])]
    taught += [row["text"] for row in read_rows([lessons.DATA / "documents.jsonl"])]
    sentences = {sentence for text in held_out for sentence in lessons.sentences_of(text)}
    assert not any(sentence in text for text in taught for sentence in sentences)
