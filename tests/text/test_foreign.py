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
from nanophi.text.schemas import messages_of
from tests.conftest import write


def read(path, **options) -> tuple[list[dict], list[str]]:
    """(rows, messages of what was skipped)."""
    bad: list[str] = []
    return list(read_rows([path], on_bad=bad.append, **options)), bad


# ---- csv


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ('"text,b\n1,2\n', "line 2: unexpected end of data"),
        ('"te"xt,b\n1,2\n', "line 1: ',' expected"),
        ("text\r一二三\r", "line 1: a line ends in CR alone"),
    ],
)
def test_a_broken_header_is_named(tmp_path, raw, message):
    """All commands that read tables ended in a traceback."""
    (tmp_path / "a.csv").write_text(raw, encoding="utf-8", newline="")
    rows, bad = read(tmp_path / "a.csv")
    assert rows == []
    assert len(bad) == 1
    assert f"a.csv, {message}" in bad[0]


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


def test_a_header_that_holds_separators_is_read_as_it_was_written(tmp_path):
    """The reader counts the separators in the header, so the writer must quote them."""
    rows = [{"text": "甲", "a;b;c": "1"}]
    write_rows(tmp_path / "a.csv", rows)
    assert read(tmp_path / "a.csv") == (rows, [])


@pytest.mark.parametrize("row", [{"text": "乙", "n": "\ud83d"}, {"text": "乙", "n": ["x"]}])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_what_no_line_of_csv_can_hold_is_refused(tmp_path, name, row):
    """Half of a surrogate pair ended the writing in a traceback."""
    with pytest.raises(UserError, match=r"write \.jsonl"):
        write_rows(tmp_path / name, [{"text": "甲", "n": "1"}, row])
    assert not os.listdir(tmp_path)


def test_a_bad_line_does_not_move_the_numbers_of_the_others(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"text,n\n\xff\xfe,1\n" + "一,2,3\n".encode())
    bad = read(tmp_path / "a.csv")[1]
    assert "a.csv, line 2: not UTF-8" in bad[0]
    assert "a.csv, line 3: 3 values under 2 columns" in bad[1]


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


@pytest.mark.parametrize("text", ["[" * 100_000, '[{"text": "甲", "n": ' + "[" * 100_000])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_brackets_without_end(tmp_path, name, text):
    """The reader of arrays went on to read the whole file, to find the end of the element."""
    (tmp_path / name).write_text(text, encoding="utf-8")
    rows, bad = read(tmp_path / name)
    assert rows == []
    assert "it is nested too deeply" in bad[0]


def test_what_is_nested_as_deeply_as_allowed_fits_a_table(tmp_path):
    """pyarrow wrote a table of 90 lists in one another, which it could not read."""
    value: object = 1
    for _ in range(formats.DEEPEST - 1):  # the row itself is one level
        value = [value]
    rows = [{"text": "甲", "n": value}]
    write(tmp_path / "a.jsonl", rows)
    write_rows(tmp_path / "a.parquet", read_rows([tmp_path / "a.jsonl"]))
    assert read(tmp_path / "a.parquet") == (rows, [])


def test_bytes_that_are_no_text_spoil_one_element_only(tmp_path):
    """An array on one line was lost as a whole, because it could not be decoded as a line."""
    (tmp_path / "a.json").write_bytes(b'[{"text": "\xff"}, {"text": "\xe7\x94\xb2"}]')
    rows, bad = read(tmp_path / "a.json")
    assert rows == [{"text": "甲"}]
    assert "a.json, element 1: it has bytes that are no text" in bad[0]


def test_wikipedia_outside_of_articles(tmp_path):
    """Text outside of <doc> and a second </doc> were taken for the text of an article."""
    lines = ["外面。", '<doc id="1">', "里面。", "</doc>", "", "</doc>"]
    (tmp_path / "wiki_00").write_text("\n".join(lines), encoding="utf-8")
    rows, bad = read(tmp_path / "wiki_00")
    assert rows == [{"id": "1", "text": "里面。"}]
    assert [message.split(":")[0][-6:] for message in bad] == ["line 1", "line 6"]


# ---- turns


def test_a_turn_of_a_table_has_nulls(tmp_path):
    """A table of both schemas has all four keys in each turn. The first two were taken: nulls."""
    empty = dict.fromkeys(("from", "value", "role", "content"))
    turns = [
        empty | {"from": "human", "value": "你好"},
        empty | {"role": "assistant", "content": "好"},
    ]
    write_rows(tmp_path / "a.parquet", [{"conversations": turns}])
    (row,), bad = read(tmp_path / "a.parquet")
    assert bad == []
    assert [message["content"] for message in messages_of(row)] == ["你好", "好"]


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

    good = [
        conversation("user", "assistant"),
        conversation("system", "system", "user", "assistant", "system", "user", "assistant"),
        {"prompt": "你好。", "chosen": "你好！", "rejected": "嗯。"},
    ]
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


def test_a_key_that_no_table_can_have(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        write_rows(tmp_path / "a.parquet", [{"text": "甲", "\ud83d": "乙"}])


def test_the_row_is_counted_from_the_beginning_of_the_file(tmp_path):
    rows = [{"text": "甲", "n": 1}] * 1100
    with pytest.raises(UserError, match="row 1,101, column 'n' cannot be written"):
        write_rows(tmp_path / "a.parquet", [*rows, {"text": "乙", "n": 10**30}])


def test_a_later_turn_loses_no_key(tmp_path):
    """pyarrow dropped a key of an object that no object of the first 1,024 rows had."""
    turn = {"role": "user", "content": "你好"}
    rows = [{"messages": [turn]}] * 1100
    with pytest.raises(UserError, match="'messages': its objects have other keys"):
        write_rows(tmp_path / "a.parquet", [*rows, {"messages": [turn | {"name": "小明"}]}])
    rows += [{"messages": []}, {"messages": [dict(reversed(turn.items()))]}]
    write_rows(tmp_path / "a.parquet", rows)
    assert read(tmp_path / "a.parquet") == (rows, [])


def test_only_the_row_of_a_broken_value_is_bad(tmp_path):
    """Bytes in a column of text that are no UTF-8 ended the reading of the file."""
    texts = pyarrow.array([b"\xff", "乙".encode()]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    rows, bad = read(tmp_path / "a.parquet")
    assert rows == [{"text": "乙"}]
    assert "a.parquet, row 1: the value under 'text' cannot be read" in bad[0]


def test_columns_of_other_kinds_are_read(tmp_path):
    columns = {
        "text": pyarrow.array(["甲"]).dictionary_encode(),
        "map": pyarrow.array([[("a", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        "bytes": pyarrow.array([b"\xff"]),
        "span": pyarrow.array([2**62], pyarrow.duration("s")),
        "null": pyarrow.array([None], pyarrow.null()),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    row = {"text": "甲", "map": [("a", 1)], "bytes": b"\xff", "span": str(2**62)}
    assert read(tmp_path / "a.parquet") == ([row], [])


def test_a_table_with_two_columns_of_one_name(tmp_path):
    """One of them was lost without a word."""
    table = pyarrow.table([pyarrow.array(["甲"]), pyarrow.array(["乙"])], ["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert "two columns are called 'text'" in read(tmp_path / "a.parquet")[1][0]


# ---- lines, encodings, special files


def test_a_line_without_end_is_skipped(tmp_path, monkeypatch):
    """A .gz of one megabyte may hold a line of gigabytes. It is never whole in memory."""
    monkeypatch.setattr(formats, "LONGEST", 1000)
    text = "短。\n" + "长" * 5000 + "\n也短。\n"
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    rows, bad = read(tmp_path / "a.txt.gz")
    assert [row["text"] for row in rows] == ["短。", "也短。"]
    assert "line 2: it is longer than" in bad[0]


def test_a_long_line_of_any_format(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "LONGEST", 1000)
    long = "长" * 100_000
    (tmp_path / "a.txt").write_bytes(f"短。\n{long}\n也短。\n".encode("utf-16"))
    rows, bad = read(tmp_path / "a.txt")
    assert [row["text"] for row in rows] == ["短。", "也短。"]
    assert "line 2: it is longer than" in bad[0]

    write_rows(tmp_path / "a.json", [{"text": "短。"}, {"text": long}])
    rows, bad = read(tmp_path / "a.json")
    assert rows == [{"text": "短。"}]
    assert "element 2: not JSON" in bad[0]
    assert "longer than" in bad[0]

    (tmp_path / "a.csv").write_text('text\n"' + "长\n" * 1000, encoding="utf-8")
    assert "larger than field limit" in read(tmp_path / "a.csv")[1][0]


@pytest.mark.parametrize("length", [10, 100_001])
def test_gbk_without_a_line_break(tmp_path, length):
    """Its beginning of 64 KiB was cut within a character, and then was no GB18030."""
    (tmp_path / "a.txt").write_bytes(b"a" + ("春天来了" * length).encode("gbk"))
    assert read(tmp_path / "a.txt") == ([{"text": "a" + "春天来了" * length}], [])


def test_short_lines_of_gbk(tmp_path):
    """Each line was taken for UTF-8 that is cut within its last character."""
    text = "A 啊\n" * 20_000
    (tmp_path / "a.txt").write_bytes(text.encode("gbk"))
    assert {row["text"] for row in read(tmp_path / "a.txt")[0]} == {"A 啊"}


def test_pipes_and_loops_are_refused(tmp_path):
    """A pipe gives its bytes once, and a file is read twice: it waited for ever."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(UserError, match="no regular file"):
        list(read_rows([tmp_path / "pipe.jsonl"]))
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    with pytest.raises(UserError, match="no regular file"):
        list(read_rows([tmp_path / "zero.jsonl"]))
    with pytest.raises(UserError, match="/dev/stdin: unknown format"):
        list(read_rows(["/dev/stdin"]))
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


def test_a_file_with_several_names_is_read_once(tmp_path):
    """A glob over a loop of links read the same rows 41 times."""
    write(tmp_path / "a.jsonl", [{"text": "甲"}])
    (tmp_path / "again").symlink_to(tmp_path)
    for inputs in (
        [f"{tmp_path}/**/*.jsonl"],
        [str(tmp_path), f"{tmp_path}/again"],
        [f"{tmp_path}/a.jsonl"] * 2,
    ):
        assert [row["text"] for row in read_rows(inputs)] == ["甲"]
        assert len(clean.Config(input=inputs, out="o.jsonl").files("o.jsonl")) == 1


def test_the_same_rows_give_the_same_archive(tmp_path):
    """A .gz held the time, and the temporary name under which it was written."""
    archives = []
    for name in ("a.jsonl.gz", "b.jsonl.gz", "c.parquet.gz", "d.parquet.gz"):
        write_rows(tmp_path / name, [{"text": "甲"}])
        assert read(tmp_path / name)[0] == [{"text": "甲"}]
        archives.append((tmp_path / name).read_bytes())
    assert archives[0] == archives[1]
    assert archives[2] == archives[3]
    assert archives[0][4:8] == bytes(4)  # the time
