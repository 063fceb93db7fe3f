"""Cleaning does what its rules say and nothing else."""

import json
import re
import unicodedata
from collections import Counter
from functools import partial

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanophi.cli import UserError
from nanophi.text import clean as clean_module
from nanophi.text import rules
from nanophi.text.clean import Config, Report, clean, clean_row, main
from nanophi.text.corpus import read_rows, write_rows
from nanophi.text.filters import FILTERS, Filter, Limits, why_dropped
from tests.text.clean_cases import CHANGES, DROPPED, KEPT, SAME


@pytest.mark.parametrize("text", SAME)
def test_what_must_not_change(text):
    """The original turned 4.567 into 4。567, deleted every second s, and tore URLs apart."""
    assert clean(text) == text


@pytest.mark.parametrize(("rule", "raw", "expected"), CHANGES)
def test_what_must_change(rule, raw, expected):
    report = Report()
    assert clean(raw, report=report) == expected
    assert clean(expected) == expected
    assert report.changed[rule]


def test_every_rule_has_its_cases():
    cases = Counter(rule for rule, _, _ in CHANGES)
    assert cases.keys() == rules.RULES.keys()
    assert min(cases.values()) >= 5
    assert len(SAME) >= 50


@pytest.mark.parametrize(("why", "text"), DROPPED)
def test_what_the_filters_drop(why, text):
    limits = Limits(min_length=20 if why == "short" else 1, min_han=0.3 if why == "language" else 0)
    assert why_dropped(text, clean(text), limits) == why


@pytest.mark.parametrize("text", KEPT)
def test_what_the_filters_keep(text):
    assert why_dropped(text, clean(text), Limits()) is None


def test_a_filter_is_a_function_and_a_row(monkeypatch):
    """A new one needs no other line; here it shares a limit, otherwise Limits gets a flag."""

    def digit_share(text: str) -> float:
        return sum(char.isdigit() for char in text) / len(text)

    monkeypatch.setitem(FILTERS, "digits", Filter(digit_share, at_most="max_symbols"))
    assert why_dropped("12345", "12345", Limits()) == "digits"
    assert why_dropped("第12345页", "第12345页", Limits()) is None


def test_questions_get_no_final_punctuation():
    assert clean("怎样才能睡得好", final=False) == "怎样才能睡得好"
    row = {"instruction": "怎样才能睡得好", "input": "", "output": "早点睡", "source": "Ａ"}
    assert clean_row(row) == {
        "instruction": "怎样才能睡得好",
        "input": "",
        "output": "早点睡。",
        "source": "Ａ",
    }
    turns = {
        "messages": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好"}]
    }
    assert [m["content"] for m in clean_row(turns)["messages"]] == ["你好", "你好。"]


SOUP = "，。！？…—!?.:,()（）“”`s \n\t<>&;#br/p=\"'"
SOUP += "ａＡ１²㎡薴么麼幺隻頭髮乾里后后面a3\u3000\u200b\u0301"
soup = st.text(st.sampled_from(SOUP), max_size=40)


@given(st.text() | soup)
@example("薴")
@example("么麼")
@example("&amp;amp;lt;br&gt;")
@example("<<p>p>")
@example("&amp;" + "amp;" * 12 + "lt;b&gt;")
def test_cleaning_twice_changes_nothing_more(text):
    once = clean(text)
    assert clean(once) == once


def check_letters(text):
    """Outside of tags, entities and what NFKC is kept from, every ASCII letter and digit of NFKC(x)
    is still there."""
    text = rules.KEPT_BY_NFKC.sub("", re.sub("[<>&＜＞＆]", "", text))
    expected = unicodedata.normalize("NFKC", text)
    assert re.sub("[^A-Za-z0-9]", "", clean(text)) == re.sub("[^A-Za-z0-9]", "", expected)


@given(st.text() | soup)
def test_letters_and_digits_survive_in_order(text):
    check_letters(text)


def test_report_and_dedup(tmp_path, capsys):
    raw = tmp_path / "raw.jsonl"
    out = tmp_path / "new" / "clean.jsonl"  # a folder that --out makes
    long = "春天来了，小草从土里探出头来，孩子们在公园里放风筝，风筝越飞越高，大家都很开心"
    texts = [long, "１２３，你好", "   ", long + "！", "另外一篇完全不同的文章，讲的是怎样泡茶"]
    raw.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    assert main(Config(input=[str(raw)], out=str(out), dedup=True)) == {
        "read": 5, "skipped": 0, "dropped": 1, "repeated": 1, "written": 3
    }  # fmt: skip
    assert [json.loads(line)["text"] for line in out.read_text(encoding="utf-8").splitlines()] == [
        long + "。", "123，你好。", "另外一篇完全不同的文章，讲的是怎样泡茶。"
    ]  # fmt: skip
    printed = capsys.readouterr().out
    assert "read 5 rows, skipped 0 bad ones, dropped 1 and 1 repeated, wrote 3" in printed
    assert "'１２３，你好' -> '123，你好'" in printed


def test_report_counts_by_rule():
    report = Report()
    clean("好ＡＢＣ。。。", report=report)
    assert report.changed == {"nfkc": 1, "repeated": 1}
    assert report.removed["repeated"] == 2


def test_sample_is_by_content_and_seed(tmp_path):
    raw = tmp_path / "raw.jsonl"
    out = tmp_path / "out.jsonl"
    lines = [json.dumps({"text": f"第{i}篇。"}) + "\n" for i in range(400)]
    taken = []
    for order, seed in ((lines, 0), (lines[::-1], 0), (lines, 1)):
        raw.write_text("".join(order), encoding="utf-8")
        main(Config(input=[str(raw)], out=str(out), sample=0.5, seed=seed))
        taken.append(set(out.read_text(encoding="utf-8").splitlines()))
    assert taken[0] == taken[1] != taken[2]
    assert all(150 < len(texts) < 250 for texts in taken)


def test_dedup_sees_the_texts_of_every_schema(tmp_path):
    """Once all rows of messages were the same text to --dedup, and one of fifty was left."""
    raw = tmp_path / "raw.jsonl"
    turns = [
        [
            {"role": "user", "content": f"{i}的平方？"},
            {"role": "assistant", "content": f"{i * i}。"},
        ]
        for i in range(50)
    ]
    raw.write_text(
        "".join(json.dumps({"messages": turn}) + "\n" for turn in [*turns, turns[7]]),
        encoding="utf-8",
    )
    counts = main(Config(input=[str(raw)], out=str(tmp_path / "out.jsonl"), dedup=True))
    assert (counts["written"], counts["repeated"]) == (50, 1)


def test_rows_without_an_answer_go(tmp_path):
    raw = tmp_path / "raw.jsonl"
    empty = {"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": " "}]}
    rows = [
        empty,
        {"instruction": "问", "output": "\u200b"},
        {"text": "好。", "output": ""},
        {"text": ""},
    ]
    raw.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert main(Config(input=[str(raw)], out=str(tmp_path / "out.jsonl")))["written"] == 1


def test_out_is_a_jsonl_file_and_not_its_own_input(tmp_path):
    (tmp_path / "raw.jsonl").write_text('{"text": "好。"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"rows are written as \.jsonl"):
        main(Config(input=[str(tmp_path)], out=str(tmp_path / "clean.doc")))
    for _ in range(2):
        assert main(Config(input=[str(tmp_path)], out=str(tmp_path / "clean.jsonl")))["read"] == 1
    with pytest.raises(UserError, match="would be overwritten"):
        main(Config(input=[str(tmp_path / "raw.jsonl")], out=str(tmp_path / "raw.jsonl")))


ROWS = [{"text": f"第{i}篇：這是ＡＢＣ" + "。" * (i % 3), "n": i} for i in range(100)] + [
    {"text": " "},
    {"text": "!@#$%" * 20},
]


@pytest.fixture
def raw(tmp_path):
    path = tmp_path / "raw" / "a.jsonl"
    write_rows(path, ROWS)
    return path


def test_workers_change_nothing(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(clean_module, "BATCH", 100)  # many batches for each process
    outputs = []
    for workers in (1, 2):
        out = tmp_path / f"{workers}.jsonl"
        dropped = tmp_path / f"dropped-{workers}.jsonl.gz"
        counts = main(Config(input=[str(raw)], out=str(out), workers=workers, dropped=str(dropped)))
        assert counts == {"read": 102, "written": 100, "repeated": 0, "skipped": 0, "dropped": 2}
        outputs.append((out.read_bytes(), list(read_rows([dropped]))))
    assert outputs[0] == outputs[1]
    assert [row["why"] for row in outputs[0][1]] == ["empty", "symbols"]
    assert [row["text"] for row in outputs[0][1]] == [row["text"] for row in ROWS[-2:]]


def test_shards_and_resuming(raw, tmp_path, capsys):
    """A command that was killed goes on behind its complete files and gives the same files."""
    out = tmp_path / "out" / "clean.jsonl"
    arguments = {"input": [str(raw)], "out": str(out), "shard_rows": 30}
    main(Config(**arguments))
    names = [f"clean-0000{i}.jsonl" for i in range(4)]
    whole = {name: (out.parent / name).read_bytes() for name in names}
    assert sorted(p.name for p in out.parent.iterdir()) == [*names, "clean.jsonl.settings"]
    for name in names[2:]:
        (out.parent / name).unlink()
    (out.parent / names[0]).write_bytes(b"")  # as a mark: it is not written again
    assert main(Config(resume=True, **arguments))["read"] == 42
    assert (out.parent / names[0]).read_bytes() == b""
    assert {name: (out.parent / name).read_bytes() for name in names[1:]} == {
        n: whole[n] for n in names[1:]
    }
    assert "2 complete shards of 30 rows each stay" in capsys.readouterr().out
    with pytest.raises(UserError, match="--resume: without differ from"):
        main(Config(resume=True, without=["nfkc"], **arguments))
    write_rows(raw, ROWS[:50])
    with pytest.raises(UserError, match="--resume: files differ from"):
        main(Config(resume=True, **arguments))
    main(Config(**arguments))
    assert sorted(p.name for p in out.parent.iterdir()) == [*names[:2], "clean.jsonl.settings"]


def test_flags_that_do_not_go_together(raw, tmp_path):
    for wrong, message in (
        ({"dedup": True, "shard_rows": 10}, "then python -m nanophi.text.dedup"),
        ({"resume": True}, "needs --shard-rows"),
        ({"without": ["nfkd"]}, "--without nfkd: no such rule; there are mojibake, "),
    ):
        with pytest.raises(UserError, match=message):
            main(Config(input=[str(raw)], out=str(tmp_path / "x.jsonl"), **wrong))


def test_rules_can_be_left_out_and_added(raw, tmp_path):
    out = tmp_path / "x.jsonl"
    main(Config(input=[str(raw)], out=str(out), without=["nfkc", "simplified"]))
    assert next(read_rows([out]))["text"] == "第0篇：這是ＡＢＣ"
    shout = {**rules.RULES, "mine": lambda text: text.replace("。", "！")}
    assert clean("真好。。", rules=shout) == "真好！"
    taiwan = {**rules.RULES, "simplified": partial(rules.simplify, config="tw2s")}
    assert clean("臺灣的計程車裏", rules=taiwan) == "台湾的计程车里。"


def test_long_texts_take_no_more_than_their_time():
    """An expression that is tried again from each place of a run takes hours on these texts; ten
    megabytes must take seconds."""
    for piece in (
        " ",
        "\u3000",
        "。",
        "!",
        "<",
        "<!--",
        "&amp;",
        "`",
        "(",
        "（",
        "<p ",
        "好 ",
        "锟斤拷",
        "…",
        "a\n",
        "\n",
    ):
        text = "好" + piece * 100_000 + "好"
        assert clean(clean(text)) == clean(text)


@pytest.mark.slow
@settings(max_examples=100_000, deadline=None)
@given(st.text() | soup)
def test_cleaning_twice_changes_nothing_more_often(text):
    once = clean(text)
    assert clean(once) == once


@pytest.mark.slow
@settings(max_examples=100_000, deadline=None)
@given(st.text() | soup)
def test_letters_and_digits_survive_more_often(text):
    check_letters(text)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["tw2s", "hk2s"])
@settings(max_examples=20_000, deadline=None)
@given(st.data())
def test_the_other_scripts_are_idempotent_too(script, data):
    one = {**rules.RULES, "simplified": partial(rules.simplify, config=script)}
    once = clean(
        data.draw(st.text(st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF)) | soup),
        rules=one,
    )
    assert clean(once, rules=one) == once
