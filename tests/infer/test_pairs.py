"""Pairs from an early checkpoint: what is kept, what is dropped and why."""

import json

import pytest

import nanophi
from nanophi.cli import UserError
from nanophi.infer.pairs import Config, fault, main, make_pairs, questions_of, similarity
from nanophi.text.corpus import read_rows
from tests.conftest import tiny_model


def test_similarity_is_difflibs_without_junk():
    assert similarity("感冒了要多喝水", "感冒了要多喝水") == 1.0
    assert similarity("甲乙丙丁", "甲乙丙戊") == 0.75
    assert similarity("", "甲") == 0.0
    long = "的" * 300 + "甲"  # with autojunk, a character this common would count for nothing
    assert similarity(long, "的" * 300 + "乙") > 0.99


def test_faults():
    assert fault("好答案", "", 0.9) == "empty"
    assert fault("好答案", " \n", 0.9) == "empty"
    assert fault("好答案", "好答案", 0.9) == "equal"
    assert fault("甲" * 30 + "好", "甲" * 30 + "坏", 0.9) == "similar"
    assert fault("多喝水，早点休息。", "我不知道。", 0.9) is None


def test_dropped_pairs_are_counted_by_reason():
    questions = [("一？", "壹是答案。"), ("二？", "贰是答案。"), ("三？", "叁是答案。")]
    rows, dropped = make_pairs(questions, ["不知道。", "贰是答案。", ""], 0.9)
    assert rows == [{"prompt": "一？", "chosen": "壹是答案。", "rejected": "不知道。"}]
    assert dropped == {"equal": 1, "empty": 1}


def test_questions_of_every_schema():
    turns = [("user", "问"), ("assistant", "答"), ("user", "再问"), ("assistant", "再答")]
    messages = [{"role": role, "content": content} for role, content in turns]
    for row in (
        {"instruction": "问", "output": "答"},
        {"prompt": "问", "chosen": "答"},
        {"prompt": "问", "chosen": "答", "rejected": "旧"},
        {"messages": messages},
    ):
        assert questions_of(row) == ("问", "答")
    with pytest.raises(UserError, match="without an answer"):
        questions_of({"messages": messages[:1]})
    with pytest.raises(UserError, match="begins with user and assistant"):
        questions_of({"messages": messages[1:]})


def test_command_writes_what_dpo_reads(tok, tmp_path, capsys):
    nanophi.save(tmp_path / "early", tiny_model(spread=0.3), tok)
    data, out = tmp_path / "sft.jsonl", tmp_path / "pairs.jsonl"
    rows = [{"instruction": f"问题{i}？", "output": "这是一个回答。"} for i in range(5)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    counts = main(
        Config(
            model=str(tmp_path / "early"),
            data=[str(data)],
            out=str(out),
            batch=2,
            max_new_tokens=12,
        )
    )
    written = list(read_rows([out]))
    assert counts["prompts"] == 5
    assert counts["pairs"] == len(written) > 0
    assert all(set(row) == {"prompt", "chosen", "rejected"} for row in written)
    assert f"wrote {len(written)} pairs" in capsys.readouterr().out


def test_prompts_longer_than_the_context_are_dropped_and_counted(tok, tmp_path, capsys):
    model = tiny_model(spread=0.3)  # context 64
    nanophi.save(tmp_path / "early", model, tok)
    rows = [{"instruction": text, "output": "这是一个回答。"} for text in ("问题？", "很长" * 50)]
    data = tmp_path / "sft.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    out = str(tmp_path / "pairs.jsonl")
    counts = main(
        Config(model=str(tmp_path / "early"), data=[str(data)], out=out, max_new_tokens=12)
    )
    assert (counts["prompts"], counts["long"]) == (2, 1)
    assert "1 longer than the context of 64 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("q.jsonl", "is an input and would be overwritten"),
        ("sub/../q.jsonl", "is an input and would be overwritten"),
        ("link.jsonl", "is an input and would be overwritten"),
        ("x.doc", r"x\.doc"),
        ("sub", "sub"),
        ("run.json", "is a file of a model, tokenizer or run"),
        ("other.jsonl", "is a file of another kind"),
        ("q.jsonl/pairs.jsonl", "is a file and no directory"),
    ],
)
def test_outputs_are_refused_before_the_work(out, message, tmp_path):
    """`--data q.jsonl --out q.jsonl` replaced the questions by pairs, and x.doc was refused only
    when every answer was there. The model does not exist, so nothing has begun.
    """
    question = json.dumps({"prompt": "问题？", "chosen": "回答。"})
    (tmp_path / "q.jsonl").write_text(question, encoding="utf-8")
    (tmp_path / "link.jsonl").symlink_to("q.jsonl")
    (tmp_path / "sub").mkdir()
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "other.jsonl").write_bytes(b"\x89PNG")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.iterdir()}
    data = [str(tmp_path / "q.jsonl")]
    with pytest.raises(UserError, match=message):
        main(Config(model=str(tmp_path / "none"), data=data, out=str(tmp_path / out)))
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.iterdir()} == before
