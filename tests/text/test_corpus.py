"""Reading and writing every format and schema."""

import gzip
import json
import lzma

import pytest

from nanophi.cli import UserError
from nanophi.text.corpus import expand, read_rows, read_texts, write_rows
from nanophi.text.schemas import messages_of

ROWS = [{"text": "第一篇。"}, {"text": "第二篇，\n有两行。"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def test_formats_and_compression(tmp_path):
    (tmp_path / "a.jsonl").write_text(LINES, encoding="utf-8")
    (tmp_path / "b.json").write_text(json.dumps(ROWS), encoding="utf-8")
    with gzip.open(tmp_path / "c.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(LINES)
    with lzma.open(tmp_path / "d.jsonl.xz", "wt", encoding="utf-8") as file:
        file.write(LINES)
    (tmp_path / "notes.md").write_text("not a document")
    assert list(read_rows([tmp_path])) == ROWS * 4
    assert (
        list(read_rows([tmp_path / "*.jsonl*", tmp_path / "a.jsonl"])) == ROWS * 3
    )  # each file once


def test_text_files_by_line_paragraph_document(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("一\n二\n\n\n三\n", encoding="utf-8")
    assert list(read_texts([path])) == ["一", "二", "三"]
    assert list(read_texts([path], "paragraph")) == ["一\n二", "三"]
    assert list(read_texts([path], "document")) == ["一\n二\n\n\n三"]


def test_line_separators_of_unicode_do_not_split_lines(tmp_path):
    """str.splitlines splits at U+2028 too, which may stand inside a JSON string."""
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "上\u2028下"}\n', encoding="utf-8")
    assert list(read_texts([path])) == ["上\u2028下"]


def test_conversation_schemas():
    expected = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]
    assert messages_of({"instruction": "问", "input": "", "output": "答"}) == expected
    assert messages_of({"prompt": "问", "response": "答"}) == expected
    assert messages_of({"messages": expected}) == expected
    turns = [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]
    assert messages_of({"conversations": turns}) == expected
    assert (
        messages_of({"instruction": "改写", "input": "句子", "output": "答"})[0]["content"]
        == "改写\n句子"
    )
    with pytest.raises(UserError, match="keys a, b is no conversation"):
        messages_of({"a": 1, "b": 2})


def test_mistakes_are_named_with_their_place(tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "好"}\n{"text": \n', encoding="utf-8")
    with pytest.raises(UserError, match=r"bad.jsonl, line 2: not JSON"):
        list(read_rows([bad]))
    bad.write_text('["x"]\n', encoding="utf-8")
    with pytest.raises(UserError, match="line 1: a row is an object"):
        list(read_rows([bad]))
    bad.write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(UserError, match="line 1: it is nested too deeply"):
        list(read_rows([bad]))
    bad.write_bytes('{"text": "好"}\n'.encode() + "编码".encode("gbk"))
    with pytest.raises(UserError, match=r"bad\.jsonl, line 2: not UTF-8 .* it looks like GB18030"):
        list(read_rows([bad]))
    with pytest.raises(UserError, match="no such file"):
        expand([tmp_path / "missing.txt"])


@pytest.mark.parametrize(
    "row",
    [
        {"text": 5},
        {"instruction": "问", "output": ["答"]},
        {"messages": "你好"},
        {"messages": ["你好"]},
        {"messages": [{"role": "user"}]},
        {"conversations": [{"from": "human", "value": None}]},
        {"prompt": "问", "chosen": [{"role": "assistant", "content": "答"}], "rejected": "答"},
    ],
)
def test_rows_of_the_wrong_shape_are_named(row, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "好"}\n' + json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"rows\.jsonl, line 2: '.*' should be"):
        list(read_rows([path]))


def test_null_is_absent_and_roles_may_stand_in_conversations(tmp_path):
    path = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]
    rows = [{"instruction": "问", "input": None, "output": "答"}, {"conversations": turns}]
    path.write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8-sig"
    )  # as Windows writes it
    assert [messages_of(row) for row in read_rows([path])] == [turns, turns]


def test_damaged_archives_are_named(tmp_path):
    for name, opener in (("a.jsonl.gz", gzip.open), ("b.jsonl.xz", lzma.open)):
        path = tmp_path / name
        with opener(path, "wt", encoding="utf-8") as file:
            file.write(LINES * 50)
        whole = path.read_bytes()
        for damaged in (whole[: len(whole) // 2], b"no archive"):
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=rf"{name} is damaged or no"):
                list(read_rows([path]))


def test_writing_is_atomic(tmp_path):
    """A writer that fails half-way leaves the old file, and no temporary one."""
    path = tmp_path / "x.jsonl.xz"
    assert write_rows(path, ROWS) == 2
    assert list(read_rows([path])) == ROWS

    def failing():
        yield ROWS[0]
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        write_rows(path, failing())
    assert list(read_rows([path])) == ROWS
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl.xz"]
