import contextlib
import io
import json
import tempfile
from pathlib import Path

from nanophi.cli import parser_for
from nanophi.text.clean import Config, Report, clean, clean_row, main
from nanophi.text.rules import RULES

# What all rules together make of a text.
CHANGED = [
    ("月亮绕着地球转……展开全文", "月亮绕着地球转……"),
    ("月亮绕着地球转...查看更多", "月亮绕着地球转..."),
    ("月亮绕着地球转。 展开全文", "月亮绕着地球转。"),
    ("月亮为什么有时圆？阅读全文", "月亮为什么有时圆？"),
    ("他说：“月亮圆了。”点击查看更多", "他说：“月亮圆了。”"),
    ("月亮绕着地球转。\n展开全文", "月亮绕着地球转。"),
    ("月亮绕着地球转\n点击查看更多", "月亮绕着地球转。"),
    ("月亮绕着地球转。\n\n展开阅读全文 ↓\n", "月亮绕着地球转。"),
    ("月亮绕着地球转。\n查看全部 >>", "月亮绕着地球转。"),
    ("月亮绕着地球转。[展开全文]", "月亮绕着地球转。"),
    ("月亮绕着地球转。【点击展开全文】", "月亮绕着地球转。"),
    ("月亮绕着地球转。（阅读更多）", "月亮绕着地球转。"),
    ("月亮繞著地球轉……展開全文", "月亮绕着地球转……"),
    ("月亮绕着地球转。\n展开全文\n点击查看更多", "月亮绕着地球转。"),
    ("展开全文", ""),
]
# Sentences that speak of a button, and buttons that are not at the end.
SAME = [
    "看不完，就点击展开全文。",
    "按一下这里可以查看更多。",
    "他正在阅读全文。",
    "“展开全文”是一个按钮。",
    "展开全文以后，还有三段。",
    "第一段。\n展开全文\n第二段。",
    "```\n展开全文\n```",
    "月亮绕着地球转。\n按钮上写着：展开全文。",
]


def row():
    assert "buttons" in RULES, f"RULES has no row `buttons`; there are {', '.join(RULES)}"
    return RULES["buttons"]


def test_buttons_go():
    row()
    for raw, expected in CHANGED:
        found = clean(raw)
        assert found == expected, f"{raw!r} becomes {found!r}, expected {expected!r}"


def test_sentences_that_speak_of_them_stay():
    row()
    for text in SAME:
        found = clean(text)
        assert found == text, f"{text!r} should stay, and becomes {found!r}"


def test_a_sentence_without_a_full_stop_is_no_button():
    rule = row()
    for text in ("看不完，就点击展开全文", "请查看更多", "月亮绕着地球转", ""):
        found = rule(text)
        assert found == text, f"{text!r} should stay, your rule makes {found!r} of it"


def test_it_stands_before_the_rule_of_the_full_stop():
    row()
    names = list(RULES)
    assert names.index("buttons") < names.index("final"), (
        "the rule `final` ends 展开全文 in 。, so `buttons` must come before it"
    )
    assert clean("月亮……展开全文", final=False) == "月亮……", "questions have buttons too"


def test_what_is_clean_stays_clean():
    """Also with more buttons than there are sweeps: clean(clean(x)) == clean(x)."""
    row()
    texts = [raw for raw, _ in CHANGED]
    texts += ["月亮。\n" + "展开全文\n" * 50, "月亮。" + "\n\n点击查看更多 >>" * 50]
    for text in texts:
        once = clean(text)
        twice = clean(once)
        lengths = f"cleaned once it has {len(once)} characters, cleaned twice {len(twice)}"
        assert twice == once, f"{text[:20]!r} ...: {lengths}"
    for text in texts[-2:]:
        found = clean(text)
        assert found == "月亮。", f"50 buttons behind 月亮。: {found[:30]!r} ... is left"


def test_conversations_are_cleaned_and_the_report_tells():
    row()
    report = Report()
    given = {"prompt": "月亮为什么圆？ 展开全文", "response": "因为……查看更多"}
    found = clean_row(given, report)
    expected = {"prompt": "月亮为什么圆？", "response": "因为……"}
    assert found == expected, f"{given} becomes {found}"
    assert report.changed["buttons"] == 2, f"2 texts have changed, the report says {report.changed}"


def test_the_command_has_it_and_can_leave_it_out():
    row()
    assert "buttons" in parser_for(Config, "").format_help(), "--help does not name the rule"
    with tempfile.TemporaryDirectory() as here:
        raw = Path(here) / "raw.jsonl"
        text = {"text": "月亮绕着地球转……展开全文"}
        raw.write_text(json.dumps(text, ensure_ascii=False), encoding="utf-8")
        for without, expected in ((None, "月亮绕着地球转……"), (["buttons"], text["text"] + "。")):
            out = Path(here) / f"clean-{len(without or [])}.jsonl"
            with contextlib.redirect_stdout(io.StringIO()):
                main(Config(input=[str(raw)], out=str(out), without=without))
            found = json.loads(out.read_text(encoding="utf-8"))["text"]
            assert found == expected, f"--without {without}: {found!r}, expected {expected!r}"
