"""Preferences that a person gives: blind choices, and a file that no crash spoils."""

import contextlib
import json
import re

import pytest

import dpo
import generate as script
from nanophi.claims import Output, claim
from nanophi.cli import UserError, run_command
from nanophi.infer.chat_modes import each_line
from nanophi.infer.prefer import Preferences, ask_for_choice, preferring
from nanophi.model.checkpoint import save
from nanophi.text.corpus import read_rows
from tests.conftest import tiny_model, write

ROW = {"prompt": "你好", "chosen": "你好！", "rejected": "嗯。"}
ENDED = EOFError, KeyboardInterrupt


def typing(monkeypatch, *lines):
    """Type these lines, of which an exception is the key that raises it. Then the input ends."""
    typed = iter(lines)

    def read(prompt=""):
        print(prompt)
        line = next(typed, EOFError)
        if line in ENDED:
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)


def good(question):
    return f"{question}好。"


def bad(question):
    return f"{question}坏。"


def ask_all(path, *lines, monkeypatch, seed=0, answers=(good, bad)):
    """Type lines in a session of its own."""
    typing(monkeypatch, *lines)
    preferences = Preferences(path)
    each_line(preferring(answers, preferences, seed))
    return preferences


# ---- asking


def test_the_choice_is_what_was_shown(tmp_path, monkeypatch, capsys):
    path = tmp_path / "mine.jsonl"
    questions = [f"问{number}" for number in range(12)]
    lines = [line for question in questions for line in (question, "1")]
    ask_all(path, *lines, monkeypatch=monkeypatch)
    rows = list(read_rows([path]))
    assert [row["prompt"] for row in rows] == questions
    shown = [line for line in capsys.readouterr().out.splitlines() if "。" in line]
    for row, line in zip(rows, shown, strict=True):
        left, right = (cell.strip() for cell in line.split("|"))
        assert (row["chosen"], row["rejected"]) == (left, right)
    firsts = {row["chosen"].removeprefix(row["prompt"]) for row in rows}
    assert firsts == {"好。", "坏。"}  # each model stands on the left now and then


def test_2_takes_the_answer_on_the_right(tmp_path, monkeypatch):
    chosen = []
    for choice in "12":
        path = tmp_path / f"{choice}.jsonl"
        ask_all(path, "问", choice, monkeypatch=monkeypatch)
        (row,) = read_rows([path])
        chosen.append(row["chosen"])
        assert {row["chosen"], row["rejected"]} == {"问好。", "问坏。"}
    assert chosen[0] != chosen[1]


def test_the_order_follows_the_seed(tmp_path, monkeypatch):
    def lefts(name, seed):
        lines = [line for number in range(12) for line in (f"问{number}", "1")]
        ask_all(tmp_path / name, *lines, monkeypatch=monkeypatch, seed=seed)
        return [row["chosen"] for row in read_rows([tmp_path / name])]

    assert lefts("a.jsonl", 0) == lefts("b.jsonl", 0) != lefts("c.jsonl", 1)


def test_sessions_of_one_question_have_both_orders(tmp_path, monkeypatch):
    """An order from the seed alone would show the same model first in every short session."""
    path = tmp_path / "mine.jsonl"
    for _ in range(12):
        ask_all(path, "问", "1", monkeypatch=monkeypatch)
    assert {row["chosen"] for row in read_rows([path])} == {"问好。", "问坏。"}


def test_only_three_words_are_choices(monkeypatch, capsys):
    typing(monkeypatch, "3", "", "12", "跳过", " 2 ")
    assert ask_for_choice() == 2
    assert capsys.readouterr().out.count("1, 2 or s(kip)") == 5


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (("一样。", "一样。 "), "both answers are equal"),  # the template strips answers
        (("", "有。"), "an answer is empty"),
        (("有。", "\n"), "an answer is empty"),
    ],
)
def test_a_pair_that_teaches_nothing_is_not_asked_about(texts, said, tmp_path, monkeypatch, capsys):
    path = tmp_path / "mine.jsonl"
    answers = tuple(lambda question, text=text: text for text in texts)
    ask_all(path, "问", monkeypatch=monkeypatch, answers=answers)
    printed = capsys.readouterr().out
    assert said in printed
    assert "s(kip)" not in printed
    assert not path.exists()


@pytest.mark.parametrize("key", ["s", *ENDED])
def test_a_question_without_a_choice_is_dropped_alone(key, tmp_path, monkeypatch):
    path = tmp_path / "mine.jsonl"
    preferences = ask_all(path, "甲", "1", "乙", key, "丙", "2", monkeypatch=monkeypatch)
    assert [row["prompt"] for row in read_rows([path])] == ["甲", "丙"]
    assert str(preferences).startswith("2 preferences more, 2 in all, in ")


def test_ctrl_c_stops_an_answer_and_not_the_session(tmp_path, monkeypatch, capsys):
    def slow(question):
        if question == "停":
            raise KeyboardInterrupt
        if question == "长":
            raise UserError("too long: shorten it")
        return "好。"

    path = tmp_path / "mine.jsonl"
    lines = ["甲", "1", "停", "长", "乙", "1", KeyboardInterrupt]
    ask_all(path, *lines, monkeypatch=monkeypatch, answers=(slow, bad))
    assert [row["prompt"] for row in read_rows([path])] == ["甲", "乙"]
    printed = capsys.readouterr().out
    assert "[stopped]" in printed
    assert "too long: shorten it" in printed


# ---- keeping


def test_a_file_is_continued_after_a_crash_at_any_byte(tmp_path, capsys):
    """A killed process may leave any part of a row; two rows in one line would be none."""
    path = tmp_path / "mine.jsonl"
    first = Preferences(path)
    for number in range(2):
        first.append(ROW | {"rejected": f"嗯}}{number}"})
    data = path.read_bytes()
    one = data.index(b"\n") + 1
    for end in range(one, len(data)):
        path.write_bytes(data[:end])
        again = Preferences(path)
        is_whole = end == len(data) - 1  # only the newline is missing
        assert again.before == 1 + is_whole
        note = capsys.readouterr().out
        assert ("half a row" in note) == (not is_whole and end > one)
        again.append(ROW)
        rows = list(read_rows([path]))
        assert rows[-1] == ROW
        assert len(rows) == len(again) == 2 + is_whole


def test_half_of_the_very_first_row_is_removed(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b'{"prom')
    assert len(Preferences(path)) == 0
    assert path.read_bytes() == b""


def test_pairs_of_others_are_continued_as_they_are(tmp_path):
    """An editor on Windows begins a file with a mark, ends lines with two signs, and leaves the
    last one open.
    """
    path = tmp_path / "mine.jsonl"
    line = json.dumps({"id": 1, **ROW}, ensure_ascii=False).encode()
    before = b"\xef\xbb\xbf" + line + b"\r\n\r\n" + line
    path.write_bytes(before)
    preferences = Preferences(path)
    preferences.append(ROW)
    assert path.read_bytes().startswith(before + b"\n")
    assert str(preferences) == (
        f"1 preference more, 3 in all, in {path}; dpo.py --data {path} learns them"
    )
    assert len(list(read_rows([path]))) == 3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"text": "a corpus"}\n', "line 1: .*chosen"),
        (b'{"text": "half a corp', "line 1: "),
        (b'{"prompt": "a", "response": "b"}', "line 1: .*chosen"),  # not half a pair, but no pair
        (b'{"prompt": "a", "response": "b"}\n{"prompt": "a", "resp', "line 1: .*chosen"),
        (b'{"prompt": "a", "chosen": 1, "rejected": "b"}\n', "line 1: 'chosen' should be a string"),
        (json.dumps(ROW, ensure_ascii=False).encode("gb18030") + b"\n", "line 1: .*in UTF-8"),
        (json.dumps(ROW).encode() + b'\n{"prompt": "a\n', "line 2: "),
    ],
)
def test_foreign_files_are_refused_and_stay_as_they_are(content, said, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=said):
        Preferences(path)
    assert path.read_bytes() == content


def test_a_full_disk_leaves_no_half_row(tmp_path):
    """The system writes as much of a row as there is room for."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "mine.jsonl"
    preferences = Preferences(path)
    preferences.append(ROW)
    whole = path.read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 10, before[1]))
    try:
        with pytest.raises(OSError, match="No space left"):
            preferences.append(ROW)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == whole
    assert len(preferences) == 1


@pytest.mark.parametrize("error", [OSError("the disk is gone"), KeyboardInterrupt])
def test_a_row_that_is_not_on_the_disk_is_not_counted(error, tmp_path, monkeypatch):
    path = tmp_path / "mine.jsonl"
    preferences = Preferences(path)
    preferences.append(ROW)
    with monkeypatch.context() as patch, contextlib.suppress(OSError, KeyboardInterrupt):
        patch.setattr("os.fsync", lambda number: (_ for _ in ()).throw(error))
        preferences.append(ROW)
    assert list(read_rows([path])) == [ROW]
    assert len(preferences) == 1


# ---- the command


@pytest.fixture(scope="module")
def models(tok, tmp_path_factory):
    """Two models that differ."""
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("甲", 0), ("乙", 1)):
        model = tiny_model(seed, spread=0.3)
        model.set_vocabulary(len(tok))
        save(folder / name, model, tok)
    return folder


def command(models, *flags):
    argv = ["--model", str(models / "甲"), "--device", "cpu", "--max-new-tokens", "8", *flags]
    run_command(script.Config, script.main, argv)


def test_dpo_reads_the_choices_between_two_models(models, tok, tmp_path, monkeypatch, capsys):
    path = str(tmp_path / "new" / "mine.jsonl")
    flags = ["--compare", str(models / "乙"), "--prefer", path]
    typing(monkeypatch, "你好", "1", "春天", "x", "2", "月亮", "s", "/exit", "小草")
    command(models, *flags)
    printed = capsys.readouterr().out
    assert "2 preferences more, 2 in all, in " in printed
    assert "甲" not in printed
    assert "乙" not in printed
    typing(monkeypatch, "2")
    command(models, *flags, "--prompt", "感冒")
    assert "1 preference more, 3 in all, in " in capsys.readouterr().out
    assert [row["prompt"] for row in read_rows([path])] == ["你好", "春天", "感冒"]
    pairs, _ = dpo.read_pairs([path], tok, 64, bos=False)
    assert len(pairs) == 3
    assert not (tmp_path / "new" / "mine.jsonl.lock").exists()


def test_two_samples_of_one_model_differ_and_follow_the_seed(models, tmp_path, monkeypatch):
    """Each answer began with the same seed, so two samples were one. Now the random numbers go on,
    and a question that is asked again has new answers.
    """
    names = ["a.jsonl", "b.jsonl"]
    for name in names:
        typing(monkeypatch, "你好", "1", "你好", "1")
        command(models, "--temperature", "1", "--prefer", str(tmp_path / name))
    rows, again = (list(read_rows([tmp_path / name])) for name in names)
    assert rows == again
    assert len({row[side] for row in rows for side in ("chosen", "rejected")}) == 4


def test_ctrl_d_at_the_only_question_ends_well(models, tmp_path, monkeypatch, capsys):
    path = tmp_path / "mine.jsonl"
    typing(monkeypatch, EOFError)
    command(models, "--compare", str(models / "乙"), "--prefer", str(path), "--prompt", "你好")
    assert "no preference was chosen" in capsys.readouterr().out
    assert not path.exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--prefer", "{new}"], "--temperature too, 0.8 say, or --compare"),
        (["--prefer", "{new}", "--temperature", "0"], "--temperature too"),
        (["--prefer", "{new}", "--temperature", "1", "--chat"], "without --chat"),
        (["--prefer", "{new}", "--temperature", "1", "--rag", "x"], "without --rag"),
        (["--prefer", "{new}", "--temperature", "1", "--raw"], "--prefer needs the template"),
        (["--prefer", "{new}", "--compare", "{model}"], "is the model itself"),
        (["--prefer", "{new}.csv", "--temperature", "1"], "should end in .jsonl"),
        (["--prefer", "{text}", "--temperature", "1"], "line 1: .*name another"),
        (["--prefer", "{model}", "--temperature", "1"], "--prefer .*"),
        (["--prefer", "{metrics}", "--temperature", "1"], "a file of a model, tokenizer or run"),
    ],
)
def test_mistakes_are_one_line_before_a_model_is_loaded(
    flags, said, models, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(script, "load_with_tokenizer", lambda *_: pytest.fail("was loaded"))
    places = {
        "new": tmp_path / "new.jsonl",
        "model": models / "甲",
        "text": write(tmp_path / "text.jsonl", [{"text": "一二三"}]),
        "metrics": write(tmp_path / "metrics.jsonl", [ROW]),
    }
    there = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(SystemExit) as end:
        command(models, *(word.format(**places) for word in flags))
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(said, line)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == there


def test_a_file_that_another_session_writes_is_refused(models, tmp_path, monkeypatch, capsys):
    path = tmp_path / "mine.jsonl"
    with claim([], Output("--prefer", path)):
        monkeypatch.setattr("nanophi.claims._held", {})  # as another process sees it
        with pytest.raises(SystemExit):
            command(models, "--temperature", "1", "--prefer", str(path), "--prompt", "你好")
    assert "is being written by process" in capsys.readouterr().err
