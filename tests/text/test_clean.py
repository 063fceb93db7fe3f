"""Cleaning does what its rules say and nothing else."""

import json
import re
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nanophi.cli import UserError
from nanophi.text import rules
from nanophi.text.clean import Config, Report, clean, clean_row, main

SAME = [
    "Homo sapiens 约4.567Ga。",
    "class Foo: pass",
    "他说：“走吧……”——然后就走了。",
    "圆周率是3.14159，版本号是1.000。",
    "写信到 info@example.org，或看 https://example.org/a?x=1&copy=2&lt=3 。",
    "C++ 和 C# 都行；a --> b；x == y；!!x ?? y",
    "1，2，3？（是的）！；：",
    "面积 5 m² 或 5㎡，步骤①②。",
    "若 a <b and c> d，List<String>，1 < 2。",
    "??? note\n    代码缩进保持不变。",
    "👨‍👩‍👧 一家人。",
    "    for i in a:\n        print(i)",
    "标签 `<p>` 和 `&lt;` 是这样写的。",
    "```html\n<p>一段</p>\n```",
    "Map<a> List<i> x;",
    "一杯半是1½杯，屏幕24″。",
    "薴是一种化合物。",
]


@pytest.mark.parametrize("text", SAME)
def test_what_must_not_change(text):
    """The original turned 4.567 into 4。567, deleted every second s, and tore URLs apart."""
    assert clean(text) == text


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("ＷｉＦｉ的密码是１２３４，记住了。", "WiFi的密码是1234，记住了。"),
        ("這隻貓喜歡曬太陽。", "这只猫喜欢晒太阳。"),
        ("真好。。。。。", "真好。"),
        ("太好了!!!!", "太好了！"),
        ("真的？？？？", "真的？"),
        ("走了…………就这样——————好。", "走了……就这样——好。"),
        ("今天天气不错", "今天天气不错。"),
        ("如图（左边）", "如图（左边）。"),
        ("共计 30", "共计 30"),
        ("<p>第一段</p><b>第二段</b>&nbsp;<br/>", "第一段\n第二段。"),
        ("&amp;lt;b&amp;gt;粗体", "粗体。"),
        ("零\u200b宽\ufeff字符\r\n换行", "零宽字符\n换行。"),
        ("　　缩进的段落。   \n\n\n\n下一段。", "缩进的段落。\n\n下一段。"),
        ("他  和  她。", "他 和 她。"),
        ("第一页\x0c第二页。", "第一页\n第二页。"),
        ("半个\ud800字符。", "半个字符。"),  # OpenCC refuses half a surrogate pair
    ],
)
def test_what_must_change(raw, expected):
    assert clean(raw) == expected


def test_questions_get_no_final_punctuation():
    assert clean("怎样才能睡得好", final=False) == "怎样才能睡得好"
    row = {"instruction": "怎样才能睡得好", "input": "", "output": "早点睡", "source": "Ａ"}
    assert clean_row(row) == {"instruction": "怎样才能睡得好", "input": "", "output": "早点睡。", "source": "Ａ"}
    turns = {"messages": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好"}]}
    assert [m["content"] for m in clean_row(turns)["messages"]] == ["你好", "你好。"]


SOUP = "，。！？…—!?.s \n\t<>&;#br/p=\"'ａＡ１²㎡薴么麼幺隻頭髮乾里后后面a3\u3000\u200b\u0301"
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


@given(st.text() | soup)
def test_letters_and_digits_survive_in_order(text):
    """Outside tags, entities and what NFKC is kept from, every ASCII letter and digit of NFKC(x) is still there."""
    text = rules.KEPT_BY_NFKC.sub("", re.sub("[<>&]", "", unicodedata.normalize("NFKC", text)))
    assert re.sub("[^A-Za-z0-9]", "", clean(text)) == re.sub("[^A-Za-z0-9]", "", text)


def test_report_and_dedup(tmp_path, capsys):
    raw, out = tmp_path / "raw.jsonl", tmp_path / "clean.jsonl"
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
    raw, out = tmp_path / "raw.jsonl", tmp_path / "out.jsonl"
    lines = [json.dumps({"text": f"第{i}篇。"}) + "\n" for i in range(400)]
    taken = []
    for order, seed in ((lines, 0), (lines[::-1], 0), (lines, 1)):
        raw.write_text("".join(order), encoding="utf-8")
        main(Config(input=[str(raw)], out=str(out), sample=0.5, seed=seed))
        taken.append(set(out.read_text(encoding="utf-8").splitlines()))
    assert taken[0] == taken[1] != taken[2]
    assert all(150 < len(texts) < 250 for texts in taken)


def test_dedup_sees_the_texts_of_every_schema(tmp_path):
    """Rows of messages once looked all alike to it, and one of fifty was left."""
    raw = tmp_path / "raw.jsonl"
    turns = [
        [{"role": "user", "content": f"{i}的平方？"}, {"role": "assistant", "content": f"{i * i}。"}] for i in range(50)
    ]
    raw.write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in [*turns, turns[7]]), encoding="utf-8")
    counts = main(Config(input=[str(raw)], out=str(tmp_path / "out.jsonl"), dedup=True))
    assert (counts["written"], counts["repeated"]) == (50, 1)


def test_rows_without_an_answer_go(tmp_path):
    raw = tmp_path / "raw.jsonl"
    empty = {"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": " "}]}
    rows = [empty, {"instruction": "问", "output": "\u200b"}, {"text": "好。", "output": ""}, {"text": ""}]
    raw.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert main(Config(input=[str(raw)], out=str(tmp_path / "out.jsonl")))["written"] == 1


def test_out_is_a_jsonl_file_and_not_its_own_input(tmp_path):
    (tmp_path / "raw.jsonl").write_text('{"text": "好。"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"rows are written as \.jsonl"):
        main(Config(input=[str(tmp_path)], out=str(tmp_path / "clean.doc")))
    for _ in range(2):
        assert main(Config(input=[str(tmp_path)], out=str(tmp_path / "clean.jsonl")))["read"] == 1
    with pytest.raises(UserError, match="only input"):
        main(Config(input=[str(tmp_path / "raw.jsonl")], out=str(tmp_path / "raw.jsonl")))
