"""Figures of answers, and the report of an evaluation."""

import json

import pytest

import nanophi
from nanophi.infer import evaluate, report
from nanophi.infer.answers import Answer, answer_all, distinct, figures_of, repetition
from nanophi.infer.generate import generate
from nanophi.tokenizer.chat import chat_prompt
from tests.conftest import SFT, TEXTS, tiny_model, write


def answer(text: str, stopped: bool = True) -> Answer:
    return Answer("问", text, len(text) + stopped, stopped)


def test_figures_by_hand():
    figures = figures_of([answer("多喝水。"), answer("多喝水。"), answer("好好好好好好", False)])
    assert figures["answers"] == 3
    assert figures["stopped"] == pytest.approx(2 / 3)
    assert figures["same"] == pytest.approx(2 / 3)
    assert figures["repetition"] == pytest.approx((2 / 3) / 3)  # 好好好好 three times, once new
    assert figures["distinct_1"] == pytest.approx(5 / 14)
    assert figures["characters"] == 4


def test_answers_of_nothing_have_no_repetition():
    assert repetition("") == 0
    assert distinct(["", "好"], 2) == 0


def test_answers_are_those_of_generate(tok):
    model = tiny_model()
    model.set_vocabulary(len(tok))
    questions = [row["instruction"] for row in SFT]
    answers = list(answer_all(model, tok, questions, batch=2, max_new_tokens=8))
    for given, question in zip(answers, questions, strict=True):
        ids = generate(model, chat_prompt(question, tok), 8)
        assert given.text == tok.decode(ids, skip_special_tokens=True).strip()
        assert given.tokens == len(ids)
        assert given.stopped == (ids[-1] == tok.eos_id)


def test_the_report_holds_all_figures(tok, tmp_path):
    model = tiny_model()
    model.set_vocabulary(len(tok))
    nanophi.save(tmp_path / "model", model, tok)
    (tmp_path / "text.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    (tmp_path / "choices" / "val").mkdir(parents=True)
    (tmp_path / "choices" / "val" / "law_val.csv").write_text(
        "id,question,A,B,C,D,answer\n0,一加一,甲,乙,丙,丁,A\n", encoding="utf-8"
    )
    results = evaluate.main(
        evaluate.Config(
            model=str(tmp_path / "model"),
            data=[str(tmp_path / "text.txt")],
            choices=str(tmp_path / "choices"),
            questions=[write(tmp_path / "q.jsonl", SFT)],
            max_new_tokens=5,
            report=str(tmp_path / "report"),
        )
    )
    saved = json.loads((tmp_path / "report" / report.JSON_NAME).read_text())
    assert saved == results
    assert saved["answers"]["answers"] == len(SFT)
    assert saved["subjects"] == [
        {"subject": "law", "questions": 1, "right": round(saved["accuracy"])}
    ]
    text = (tmp_path / "report" / report.MARKDOWN_NAME).read_text()
    assert f"| text.txt | {saved['bits_per_byte']:.3f} |" in text
    assert "standard error" in text
    assert SFT[0]["instruction"] in text


def test_a_line_of_an_answer_stays_in_its_cell():
    assert report.table(["a"], [["一\n二|三"]]).splitlines()[2] == "| 一⏎二\\|三 |"
