"""The page and the picture at the end of the demo."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

from examples import picture, report
from nanophi import load
from tests.conftest import ANSWER, QUESTION, SFT

ROOT = Path(__file__).resolve().parents[1]
STAGES = [
    SimpleNamespace(name="clean", seconds=1.25, peak_gb=0.5, key_figure="20 documents"),
    SimpleNamespace(name="sft", seconds=60.0, peak_gb=0.75, key_figure="loss < 0.1"),
]
ASKED = [
    SimpleNamespace(question=QUESTION, text=ANSWER, as_taught=True),
    SimpleNamespace(question="1 < 2 吗？", text="<b>不知道</b>", as_taught=False),
]
READ = [SimpleNamespace(question="几天？", sentence="三天。", text="三天。", is_right=True)]
CONVERSATION = [
    {"role": "user", "content": SFT[1]["instruction"]},
    {"role": "assistant", "content": SFT[1]["output"]},
]


@pytest.fixture(scope="module")
def page(house, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    model, tok = load(house / "dpo")
    runs = [str(house / name) for name in ("pretrain", "sft", "dpo")]
    sections = [
        report.stages(STAGES),
        report.losses({"pretraining": runs[0], "DPO": runs[2]}),
        report.moments(QUESTION, [(0, "\n"), (20, "不。")], report.answer_of(runs[2], QUESTION)),
        report.tokenizer(tok, QUESTION),
        report.mask(CONVERSATION, tok),
        report.attention(model, tok, QUESTION),
        report.answers(ASKED),
        report.reading(READ),
    ]
    report.write_report(path, report.both("标题", "Title"), sections)
    return path


def test_the_page_needs_nothing_from_outside(page):
    html = page.read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["'](?!#)""", html)
    assert "@import" not in html
    assert html.count('lang="zh"') == html.count('lang="en"')


def test_texts_are_escaped_and_wrong_answers_marked(page):
    html = page.read_text(encoding="utf-8")
    assert "1 &lt; 2 吗？" in html
    assert '<span class="wrong">&lt;b&gt;不知道&lt;/b&gt;</span>' in html
    assert f'<span class="right">{ANSWER}</span>' in html


def test_only_the_answer_is_green(page):
    learned = re.findall(r'class="token learned">([^<]*)<', page.read_text(encoding="utf-8"))
    assert "".join(learned) == SFT[1]["output"] + "[EOS]"


def test_the_page_opens_in_a_browser_in_both_languages(page):
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    from tests.infer.test_page import CHROMIUM

    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    complaints = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(locale="zh-CN", viewport={"width": 390, "height": 800})
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.goto(page.as_uri())
        assert tab.inner_text("h1") == "标题"
        tab.click("button")
        assert tab.inner_text("h1") == "Title"
        assert tab.evaluate("document.documentElement.scrollWidth") == 390  # no scrolling sideways
        browser.close()
    assert complaints == []


def test_the_picture_marks_what_is_wrong(tmp_path):
    """The picture of the READMEs once showed three broken answers of five, without a word."""
    path = tmp_path / "chat.svg"
    picture.write_chat(path, [(QUESTION, ANSWER, True), (QUESTION, "不知道。", False)])
    svg = path.read_text(encoding="utf-8")
    assert svg.count(picture.WRONG) == 1
    assert svg.index("不知道。") < svg.index(picture.WRONG)


def test_the_moving_picture_shows_each_answer_in_its_turn(tmp_path):
    path = tmp_path / "learning.svg"
    losses = [5.0, 2.5, 1.0, 0.5]
    picture.write_moving(path, QUESTION, losses, [(0, "嗯<"), (2, "多喝水"), (4, ANSWER)])
    svg = path.read_text(encoding="utf-8")
    xml = ElementTree.fromstring(svg)
    answers = [group for group in xml.iter() if group.tag.endswith("}g")]
    assert [group.get("opacity") for group in answers] == ["0", "0", "1"]  # where nothing moves
    begins = [group[0].get("keyTimes").split(";")[-2] for group in answers]
    assert begins == ["0", "0.350", "0.700"]


def test_samples_are_those_of_the_evaluations(house, tmp_path):
    lines = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "sample": "好"}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = report.samples_of(str(tmp_path), QUESTION, before=str(house / "sft"))
    assert told == [(0, ANSWER), (2, "好")]


def test_the_picture_of_the_readmes_is_honest():
    """It shows right answers and one wrong one, which is marked; and no character is broken."""
    svg = (ROOT / "docs" / "demo-answers.svg").read_text(encoding="utf-8")
    assert "\ufffd" not in svg
    questions = svg.count(picture.COLOURS["question"][0])
    assert questions == 5
    assert svg.count(picture.WRONG) == 1
