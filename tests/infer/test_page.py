"""The page in a real Chromium, driven by playwright, at two widths."""

import json
import shutil
import threading

import pytest

from nanophi.infer.engine import Engine
from nanophi.infer.prefer import Preferences
from nanophi.model.checkpoint import load
from nanophi.text.corpus import read_rows
from nanophi.text.schemas import messages_of, preference_of
from tests.conftest import ANSWER, QUESTION
from tests.infer.test_server import Serving

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
WIDTHS = {"wide": (1280, 800), "phone": (390, 844)}
EVIL = "<img src=x onerror=alert(1)><b>粗</b> & 你好"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        flags = [
            "--no-sandbox", "--disable-gpu", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", "--no-first-run",
        ]  # fmt: skip
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def serving(house, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "mine.jsonl"
    engines = {
        "sft": Engine(*load(house / "sft"), rows=2),
        "pretrain": Engine(*load(house / "pretrain"), rows=2),
    }
    serving = Serving(engines, Preferences(path))
    yield serving
    serving.stop()


@pytest.fixture(params=WIDTHS)
def page(request, browser, serving):
    """A page of its own, with an empty history. Whatever it asks of others is an error."""
    width, height = WIDTHS[request.param]
    context = browser.new_context(
        viewport={"width": width, "height": height}, accept_downloads=True
    )
    page = context.new_page()
    wrong = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
    page.on(
        "request",
        lambda sent: (
            wrong.append(sent.url)
            if not sent.url.startswith((serving.url, "blob:", "data:"))
            else 0
        ),
    )
    page.goto(serving.url)
    page.set_default_timeout(30_000)
    yield page
    assert not wrong
    # Nothing is wider than the screen.
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    context.close()


def ask(page, question):
    page.fill("#question", question)
    page.click("#send")


def answered(page, count=1):
    page.wait_for_function(
        "n => document.querySelectorAll('.turn.assistant .tools').length === n", arg=count
    )
    return page.locator(".turn.assistant .text").last.inner_text()


def test_a_question_is_answered_kept_and_asked_again(page):
    ask(page, QUESTION)
    assert answered(page) == ANSWER
    assert "个词元，每秒" in page.inner_text("#status")
    page.reload()
    assert page.inner_text(".turn.user .text") == QUESTION
    page.click("text=重新回答")
    assert answered(page) == ANSWER
    page.locator(".turn.user >> text=修改").click()
    assert page.input_value("#question") == QUESTION
    assert page.locator(".turn").count() == 0


def test_text_is_never_html(page):
    ask(page, EVIL)
    answered(page)
    assert page.inner_text(".turn.user .text") == EVIL
    assert page.locator(".turn img, .turn b").count() == 0


def test_an_answer_is_stopped_and_its_row_is_free(page, serving):
    page.click("summary")
    page.fill("input[name=max_tokens]", "100")
    page.fill("input[name=temperature]", "2")
    page.select_option("#model", "pretrain")
    engine = serving.engines["pretrain"]
    hidden = engine.network.hidden

    page_waits = threading.Event()

    def slow(*args, **named):
        page_waits.wait(0.1)
        return hidden(*args, **named)

    engine.network.hidden = slow
    try:
        ask(page, "春天")
        page.wait_for_selector(".turn.assistant .busy:not(:empty)")
        page.click("#stop")
        answered(page)
        assert "（已停止）" in page.inner_text(".turn.assistant .text")
    finally:
        engine.network.hidden = hidden
        page_waits.set()
    page.wait_for_function("!document.querySelector('#send').hidden")
    while engine.active:
        pass


def test_enter_sends_but_not_while_an_input_method_composes(page):
    page.focus("#question")
    typing = page.context.new_cdp_session(page)
    typing.send("Input.imeSetComposition", {"text": "gan", "selectionStart": 3, "selectionEnd": 3})
    # The key that an input method has taken, as browsers report it.
    page.evaluate(
        """() => at("question").dispatchEvent(new KeyboardEvent("keydown",
            {key: "Enter", keyCode: 229, isComposing: true, bubbles: true, cancelable: true}))"""
    )
    assert page.locator(".turn").count() == 0
    typing.send("Input.insertText", {"text": QUESTION})
    assert page.input_value("#question") == QUESTION
    page.keyboard.press("Shift+Enter")
    assert page.locator(".turn").count() == 0
    page.keyboard.press("Enter")
    assert answered(page) == ANSWER


def test_the_reader_is_left_where_he_reads(page):
    page.evaluate(
        """() => {
            conversation().messages = Array.from({length: 40}, (_, i) =>
                ({role: i % 2 ? "assistant" : "user", content: "一行\\n二行\\n三行"}));
            draw();
        }"""
    )
    page.evaluate("main.scrollTop = 100")
    page.evaluate("following(() => document.querySelector('#log').append(make('p', {}, '新')))")
    assert page.evaluate("main.scrollTop") == 100
    page.evaluate("main.scrollTop = main.scrollHeight")
    page.evaluate("following(() => document.querySelector('#log').append(make('p', {}, '新')))")
    assert page.evaluate("isAtEnd()")


def test_a_token_is_looked_at(page):
    page.click("summary")
    page.fill("input[name=top_k]", "3")
    page.fill("input[name=temperature]", "0.5")
    page.fill("input[name=seed]", "1")
    ask(page, QUESTION)
    answered(page)
    page.click("text=显微镜")
    page.wait_for_selector(".lens .chip")
    page.locator(".chip:not(.prompt)").nth(1).click()
    page.wait_for_selector(".lens table")
    assert page.locator(".lens tbody tr").count() == 10
    assert page.locator(".lens thead th").all_inner_texts() == [
        "词元", "模型", "温度（0 为贪心）", "top-k",
    ]  # fmt: skip
    assert page.locator(".lens td.gone").count() >= 7
    assert page.locator(".lens tr.chosen").count() == 1
    page.click("text=显微镜")
    page.wait_for_selector(".lens", state="detached")


def test_the_better_answer_becomes_a_row(page, serving):
    page.click("#prefer-view")
    ask(page, QUESTION)
    page.wait_for_selector(".card button")
    texts = page.locator(".card .text").all_inner_texts()
    assert len(set(texts)) == 2
    page.locator(".card button").nth(1).click()
    page.wait_for_selector("#status:has-text('已记下')")
    row = list(read_rows([serving.preferences.path], use=preference_of))[-1]
    prompt, chosen, rejected = row
    assert prompt == QUESTION
    assert [chosen, rejected] == [texts[1].strip(), texts[0].strip()]


def test_a_conversation_is_exported_as_a_row_for_sft(page, tmp_path):
    ask(page, QUESTION)
    answered(page)
    with page.expect_download() as download:
        page.click("#export")
    path = tmp_path / "row.jsonl"
    download.value.save_as(path)
    (messages,) = read_rows([str(path)], use=messages_of)
    assert [message["content"] for message in messages] == [QUESTION, ANSWER]
    assert json.loads(path.read_text(encoding="utf-8")).keys() == {"messages"}


def test_both_languages_and_both_colours(page):
    assert page.inner_text("#send") == "发送"
    page.click("#language")
    assert page.inner_text("#send") == "Send"
    assert page.get_attribute("html", "lang") == "en"
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    page.reload()
    assert page.inner_text("#send") == "Send"


def test_a_character_that_a_packet_cuts_is_whole(page):
    """Each byte of an event comes alone."""
    said = page.evaluate(
        """async () => {
            const data = new TextEncoder().encode('data: {"a": "感冒😀"}\\n\\ndata: [DONE]\\n\\n');
            const body = new ReadableStream({start(out) {
                for (const byte of data) out.enqueue(new Uint8Array([byte]));
                out.close();
            }});
            const found = [];
            for await (const event of events({body})) found.push(event.a);
            return found;
        }"""
    )
    assert said == ["感冒😀"]


def test_a_chat_that_outgrows_the_context_loses_its_oldest_turns(page):
    page.click("summary")
    page.fill("input[name=history]", "50")
    page.evaluate(
        """() => {
            conversation().messages = [{role: "user", content: "好".repeat(400)},
                {role: "assistant", content: "好".repeat(400)}];
        }"""
    )
    ask(page, QUESTION)
    assert answered(page, 2) == ANSWER
