"""Files as other programs and people leave them: read, or skipped and named, never a traceback."""

import gzip
import json
import os
from datetime import datetime
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from nanophi.cli import UserError
from nanophi.text import clean, formats
from nanophi.text.corpus import read_rows, write_rows
from nanophi.text.rules import simplify
from tests.conftest import write


def read(path, **options) -> tuple[list[dict], list[str]]:
    """(rows, messages of what was skipped)."""
    bad: list[str] = []
    return list(read_rows([path], on_bad=bad.append, **options)), bad


# ---- csv


@pytest.mark.parametrize("raw", ['"text,b\n1,2\n', '"te"xt,b\n1,2\n', "text\r一二三\r"])
def test_a_broken_header_is_named(tmp_path, raw):
    """All commands that read tables ended in a traceback."""
    (tmp_path / "a.csv").write_text(raw, encoding="utf-8", newline="")
    rows, bad = read(tmp_path / "a.csv")
    assert rows == []
    assert len(bad) == 1
    assert "a.csv, line" in bad[0]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_the_separator_is_found(tmp_path, separator):
    """With `;` the message was: a row with the keys text;source is no conversation."""
    text = f'text{separator}source\n"甲，{separator}乙"{separator}书\n'
    (tmp_path / "a.csv").write_text(text, encoding="utf-8")
    assert read(tmp_path / "a.csv") == ([{"text": f"甲，{separator}乙", "source": "书"}], [])


def test_tsv_is_written_and_read(tmp_path):
    rows = [{"text": "甲\t乙", "source": "书, 一; 二"}]
    write_rows(tmp_path / "a.tsv.gz", rows)
    assert read(tmp_path / "a.tsv.gz") == (rows, [])


def test_column_names(tmp_path):
    """pandas writes its index under an empty name; of two columns of one name, one was lost."""
    (tmp_path / "a.csv").write_text(",text\n0,甲\n", encoding="utf-8")
    assert read(tmp_path / "a.csv")[0] == [{"column_1": "0", "text": "甲"}]
    (tmp_path / "a.csv").write_text("text,text\n甲,乙\n", encoding="utf-8")
    assert "two columns are called 'text'" in read(tmp_path / "a.csv")[1][0]


# ---- JSON


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_raw_tab_in_a_string_is_read(tmp_path, name):
    row = '{"text": "甲\t乙"}'
    (tmp_path / name).write_text(f"[{row}]" if name == "a.json" else row, encoding="utf-8")
    assert read(tmp_path / name) == ([{"text": "甲\t乙"}], [])


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize(
    ("value", "message"),
    [("[" * 200 + "]" * 200, "nested too deeply"), ("9" * 5000, "thousands of digits")],
)
def test_a_value_that_python_cannot_hold_is_one_bad_row(tmp_path, name, value, message):
    rows = ['{"text": "甲"}', f'{{"text": "乙", "n": {value}}}', '{"text": "丙"}']
    text = f"[{','.join(rows)}]" if name == "a.json" else "\n".join(rows)
    (tmp_path / name).write_text(text, encoding="utf-8")
    rows, bad = read(tmp_path / name)
    assert [row["text"] for row in rows] == ["甲", "丙"]
    assert message in bad[0]


def test_a_turn_with_keys_of_two_schemas(tmp_path):
    """`clean` took the number under "content" for the text, in a turn that has "value" too."""
    turns = [{"from": "human", "value": "你好吗", "content": 5}, {"from": "gpt", "value": "好。"}]
    data = write(tmp_path / "a.jsonl", [{"conversations": turns}])
    clean.main(clean.Config(input=[data], out=str(tmp_path / "o.jsonl")))
    assert read(tmp_path / "o.jsonl")[0] == [{"conversations": turns}]


def test_conversations_that_do_not_take_turns_are_dropped(tmp_path, capsys):
    """`clean` passed them, and `sft.py` stopped at the first of a hundred thousand rows."""

    def conversation(*roles):
        return {"messages": [{"role": role, "content": "你好。"} for role in roles]}

    good = [conversation("user", "assistant"), conversation("system", "user", "assistant")]
    bad = [conversation("user", "assistant", "user", "user"), conversation("assistant")]
    data = write(tmp_path / "a.jsonl", good + bad)
    out, dropped = str(tmp_path / "o.jsonl"), str(tmp_path / "d.jsonl")
    clean.main(clean.Config(input=[data], out=out, dropped=dropped))
    assert read(out)[0] == good
    lines = Path(dropped).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["why"] for line in lines] == ["turns"] * 2
    assert "turns" in capsys.readouterr().out


# ---- parquet


def test_a_time_beyond_the_calendar(tmp_path):
    """It ended all readers with OverflowError."""
    times = pyarrow.array([2**62, 0], pyarrow.timestamp("us"))
    table = pyarrow.table({"text": ["甲", "乙"], "at": times})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    rows, bad = read(tmp_path / "a.parquet")
    assert [row["text"] for row in rows] == ["甲", "乙"]
    assert rows[1]["at"] == datetime(1970, 1, 1)
    assert bad == []


@pytest.mark.parametrize(
    ("row", "column"),
    [({"n": 10**30}, "n"), ({"n": "\ud83d"}, "n"), ({"n": [1, "x"]}, "n")],
)
def test_what_a_table_cannot_hold_names_row_and_column(tmp_path, row, column):
    rows = [{"text": "甲", "n": None}, {"text": "乙"} | row]
    with pytest.raises(UserError, match=f"row 2, column '{column}' cannot be written"):
        write_rows(tmp_path / "a.parquet", rows)
    assert not os.listdir(tmp_path)


# ---- lines, encodings, special files


def test_a_line_without_end_is_skipped(tmp_path, monkeypatch):
    """A .gz of one megabyte may hold a line of gigabytes. It is never whole in memory."""
    monkeypatch.setattr(formats, "LONGEST", 1000)
    text = "短。\n" + "长" * 5000 + "\n也短。\n"
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    rows, bad = read(tmp_path / "a.txt.gz")
    assert [row["text"] for row in rows] == ["短。", "也短。"]
    assert "line 2: it is longer than" in bad[0]


@pytest.mark.parametrize("length", [10, 100_001])
def test_gbk_without_a_line_break(tmp_path, length):
    """Its beginning of 64 KiB was cut within a character, and then was no GB18030."""
    (tmp_path / "a.txt").write_bytes(b"a" + ("春天来了" * length).encode("gbk"))
    assert read(tmp_path / "a.txt") == ([{"text": "a" + "春天来了" * length}], [])


def test_pipes_and_loops_are_refused(tmp_path):
    """A pipe gives its bytes once, and a file is read twice: it waited for ever."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(UserError, match="no regular file"):
        list(read_rows([tmp_path / "pipe.jsonl"]))
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        list(read_rows([tmp_path / "loop.jsonl"]))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "again").symlink_to(tmp_path / "folder")
    write(tmp_path / "folder" / "a.jsonl", [{"text": "甲"}])
    assert [row["text"] for row in read_rows([tmp_path / "folder"])] == ["甲"]


# ---- cleaning


@pytest.mark.parametrize(
    "text",
    [
        "中" + "\u200d" * 1000 + "文。",
        "中" + "&#8205;" * 1500 + "文",
        "中" + "<" * 300 + "b>" * 300,
    ],
)
def test_runs_of_joiners_go_at_once(text):
    """Each sweep took two away, and a hundred sweeps were the most."""
    once = clean.clean(text)
    assert clean.clean(once) == once
    assert "\u200d" not in once


@pytest.mark.parametrize(
    "part",
    ["<script>", "<!--", "<style>", "&lt;!--", "<scr<script></script>ipt>", "<script>a</script"],
)
def test_cleaning_is_linear(part):
    """A document of 128 KB took 18 seconds, and one of twice the length four times as long."""
    text = "中>" + part * (300_000 // len(part))
    once = clean.clean(text)
    assert clean.clean(once) == once


def test_simplified_text_keeps_characters_of_both_scripts():
    """乾清宫 became 干清宫, and 著急 stayed."""
    text = "北京故宫的乾清宫和坤宁宫。"
    assert simplify(text) == text
    assert simplify("他著急地寫一部著作。") == "他着急地写一部著作。"
