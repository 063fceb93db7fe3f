"""Every format is written and read back, in every encoding; messages name the place of a fault."""

import io
import json
import lzma

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanophi.cli import UserError
from nanophi.text import clean, corpus, formats
from nanophi.text.corpus import Config, Skipped, main, read_rows, read_texts, write_rows
from nanophi.text.formats import FORMATS, write_txt
from nanophi.text.outputs import numbered, write_files

ROWS = [
    {"text": "第一篇。", "source": "甲"},
    {"text": '第二篇，"引号"，\n有两行。', "source": "乙, 丙"},
]
COMPRESSIONS = ["", ".gz", ".bz2", ".xz", ".zst"]


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("kind", [name for name, form in FORMATS.items() if form.write])
def test_what_is_written_is_read(tmp_path, kind, compression):
    if kind == ".parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / f"news.2024{kind}{compression}"
    assert write_rows(path, ROWS) == 2
    if kind == ".txt":
        assert list(read_texts([path], "paragraph")) == [row["text"] for row in ROWS]
    else:
        assert list(read_rows([path])) == ROWS
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("compression", COMPRESSIONS[1:])
def test_damage_is_named(tmp_path, compression):
    path = tmp_path / f"a.jsonl{compression}"
    write_rows(path, ROWS * 100)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"no archive of this kind"):
        path.write_bytes(damaged)
        with pytest.raises(
            UserError, match=rf"a\.jsonl\{compression} is damaged or no \{compression} file"
        ):
            list(read_rows([path]))


def test_archives_in_several_pieces(tmp_path):
    """Tools that compress in parallel, and `cat a.gz b.gz`, write several streams. All of them are
    read.
    """
    for compression in COMPRESSIONS[1:]:
        path = tmp_path / f"a.jsonl{compression}"
        write_rows(path, ROWS)
        path.write_bytes(path.read_bytes() * 3)
        assert list(read_rows([path])) == ROWS * 3


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gb18030"])
def test_encodings(tmp_path, encoding, capsys):
    text = "春天来了，小草从土里探出头来。\n孩子们在公园里放风筝。\n"
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    assert list(read_texts([tmp_path / "a.txt"])) == text.split()
    assert (encoding.upper() in capsys.readouterr().err) == (encoding in ("utf-16", "gb18030"))


def test_lines_in_another_encoding_are_named(tmp_path):
    path = tmp_path / "mixed.txt"
    path.write_bytes(
        "第一行。\n第二行。\n".encode()
        + "第三行是别的编码。\n".encode("gbk")
        + "第四行。\n".encode()
    )
    skipped = Skipped()
    assert list(read_texts([path], on_bad=skipped)) == ["第一行。", "第二行。", "第四行。"]
    assert "mixed.txt, line 3: not UTF-8" in skipped.first[0]
    assert "looks like GB18030" in skipped.first[0]
    path.write_bytes(b"\xff\xfe" + "半个".encode("utf-16-le") + b"\n\x00\x41")
    with pytest.raises(UserError, match="not UTF-16"):
        list(read_texts([path]))


def test_utf8_that_could_be_gb18030_stays_utf8(tmp_path, capsys):
    """Every two-byte pair of these is valid in GBK too, where it would read 鐨勬槸 and the like."""
    path = tmp_path / "a.txt"
    path.write_bytes(
        "的是\n中文测试\n".encode() * 20_000
    )  # longer than the part that is looked at, cut inside a line
    assert set(read_texts([path])) == {"的是", "中文测试"}
    assert capsys.readouterr().err == ""


@given(
    st.lists(st.dictionaries(st.sampled_from(["text", "a"]), st.text(max_size=30), min_size=1)),
    st.integers(1, 9),
)
def test_a_json_array_is_read_in_pieces(rows, chunk):
    """However the pieces of the file fall, the elements are those that json.loads gives."""
    for indent in (None, 2):
        text = json.dumps(rows, ensure_ascii=False, indent=indent)
        pieces = [text[i : i + chunk] for i in range(0, len(text), chunk)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(formats, "_pieces", lambda path, on_bad, pieces=pieces: iter(pieces))
            assert [make() for _, make in formats.read_json("x.json", "line", None)] == rows


def test_broken_json_arrays(tmp_path):
    path, skipped = tmp_path / "a.json", Skipped()
    path.write_text(
        '[{"text": "一。"}, {"text": "二。"}, {"text" "三。"}, {"text": "四。"}]', encoding="utf-8"
    )
    assert list(read_texts([path], on_bad=skipped)) == ["一。", "二。"]
    assert (
        "a.json, element 3: not JSON (Expecting ':' delimiter); it ends the reading"
        in skipped.first[0]
    )
    path.write_text('{"text": "一。"}', encoding="utf-8")
    with pytest.raises(UserError, match="holds no array of objects"):
        list(read_rows([path]))


def test_csv(tmp_path):
    path, skipped = tmp_path / "a.csv", Skipped()
    path.write_text(
        'text,n\n"一，\n二",1\n三,2,多\n\n四,3\n', encoding="utf-8-sig"
    )  # as spreadsheets write it
    assert list(read_rows([path], on_bad=skipped)) == [
        {"text": "一，\n二", "n": "1"},
        {"text": "四", "n": "3"},
    ]
    assert "a.csv, line 4: 3 values under 2 columns (text, n)" in skipped.first[0]
    with pytest.raises(UserError, match="one header and flat values"):
        write_rows(path, [{"text": "一"}, {"text": "二", "n": 1}])
    path.write_text("text\n" + "长" * 200_000 + "\n一\x00二\n", encoding="utf-8")
    assert list(map(len, read_texts([path]))) == [200_000, 3]


def test_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    path = tmp_path / "a.parquet"
    turns = [
        {
            "messages": [
                {"role": "user", "content": f"问{i}"},
                {"role": "assistant", "content": "答"},
            ]
        }
        for i in range(2000)
    ]
    assert write_rows(path, turns) == 2000
    assert list(read_rows([path])) == turns
    write_rows(path, [{"content": "好。"}])
    with pytest.raises(UserError, match=r"a\.parquet, row 1: has no 'body', only content"):
        list(read_rows([path], field="body"))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"damaged or no \.parquet file"):
        list(read_rows([path], field="content"))


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(UserError, match=r"pip install 'nanophi\[parquet\]'"):
        list(read_rows([tmp_path]))


def test_wiki_extracts(tmp_path):
    (tmp_path / "wiki_00").write_text(
        '<doc id="1" url="https://zh.example/1" title="数学">\n数学\n\n数学是……\n</doc>\n'
        '<doc id="2" url="u" title="哲学">\n哲学\n</doc>\n', encoding="utf-8",
    )  # fmt: skip
    (tmp_path / "wiki_01").write_text(
        '{"id": "3", "title": "化学", "text": "化学是……"}\n', encoding="utf-8"
    )
    rows = list(read_rows([tmp_path]))
    assert [row["text"] for row in rows] == ["数学\n\n数学是……", "哲学", "化学是……"]
    assert rows[0]["title"] == "数学"
    (tmp_path / "wiki_00").write_text('<doc id="1">\n没有结尾\n', encoding="utf-8")
    with pytest.raises(UserError, match="wiki_00, line 1: <doc> without its </doc>"):
        list(read_rows([tmp_path]))


def test_baike_and_other_columns(tmp_path):
    path = tmp_path / "a.jsonl"
    entry = {
        "title": "茶",
        "summary": "一种饮料。",
        "sections": [{"title": "种类", "content": "绿茶。"}],
        "url": "u",
    }
    path.write_text(
        json.dumps(entry) + '\n{"title": "无", "summary": null, "sections": null, "text": "正文"}\n'
    )
    assert list(read_rows([path])) == [
        {"title": "茶", "url": "u", "text": "茶\n一种饮料。\n种类\n绿茶。"},
        {"title": "无", "text": "正文"},
    ]
    path.write_text('{"content": "正文", "id": 1}\n{"id": 2}\n', encoding="utf-8")
    skipped = Skipped()
    assert list(read_rows([path], field="content", on_bad=skipped)) == [{"id": 1, "text": "正文"}]
    assert "line 2: has no 'content', only id" in skipped.first[0]


def test_memory_does_not_grow_with_the_file(tmp_path):
    """15 MB of rows, as lines and as an array, pass through less than 4 MB of memory."""
    import tracemalloc

    rows = [
        {"text": "".join(map(chr, np.random.default_rng(i).integers(0x4E00, 0x9000, 1000)))}
        for i in range(50)
    ]
    for name in ("a.jsonl.gz", "a.json.gz"):
        write_rows(tmp_path / name, (row for _ in range(100) for row in rows))
        tracemalloc.start()
        assert sum(1 for _ in read_rows([tmp_path / name])) == 5000
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4e6, name


def test_files_of_so_many_rows(tmp_path):
    rows = [{"text": f"{i}。"} for i in range(10)]
    path = tmp_path / "a.jsonl.gz"
    assert numbered(path, 3).name == "a-00003.jsonl.gz"
    assert write_files(path, rows, 3) == 10
    assert [p.name for p in sorted(tmp_path.iterdir())] == [f"a-0000{i}.jsonl.gz" for i in range(4)]
    assert list(read_rows([tmp_path])) == rows
    with pytest.raises(UserError, match=r"a-00000\.jsonl\.gz is there already"):
        write_files(path, rows[:5], 3)


def test_the_command_converts(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("内容,n\n一。,1\n二。,2,3\n", encoding="gb18030")
    out = tmp_path / "b.jsonl.xz"
    assert main(Config(input=[str(tmp_path / "a.csv")], field="内容", out=str(out))) == 1
    with lzma.open(out, "rt", encoding="utf-8") as file:
        assert json.loads(file.read()) == {"n": "1", "text": "一。"}
    assert "wrote 1 rows" in capsys.readouterr().out
    for wrong, message in (
        ({}, "give --input FILES"),
        ({"input": ["x"], "fetch": "sanguo"}, "give --input FILES"),
    ):
        with pytest.raises(UserError, match=message):
            main(Config(out=str(out), **wrong))
    with pytest.raises(UserError, match="rows are written as"):
        main(Config(input=[str(tmp_path / "a.csv")], out=str(tmp_path / "b.xml")))


def test_tables_lose_no_column(tmp_path):
    """pyarrow takes the columns of the first row alone; a whole column was gone without a word."""
    pytest.importorskip("pyarrow")
    rows = [
        {"text": "一"},
        {"text": "二", "label": "x"},
        {"messages": [{"role": "user", "content": "问"}]},
    ]
    write_rows(tmp_path / "a.parquet", rows)
    assert list(read_rows([tmp_path / "a.parquet"])) == rows  # what is null is absent again
    with pytest.raises(UserError, match="extra: a key that none of the first 1,024 rows has"):
        write_rows(tmp_path / "b.parquet", [{"text": "一"}] * 2000 + [{"text": "二", "extra": 1}])
    with pytest.raises(UserError, match="row 2,001, column 'n' cannot be written"):
        write_rows(
            tmp_path / "c.parquet", [{"text": "一", "n": 1}] * 2000 + [{"text": "二", "n": "x"}]
        )
    write_rows(tmp_path / "d.csv", [{"text": "一", "n": 1}, {"text": "二"}])
    assert list(read_rows([tmp_path / "d.csv"])) == [
        {"text": "一", "n": "1"},
        {"text": "二", "n": ""},
    ]


def test_a_lost_quote_does_not_swallow_the_rest(tmp_path):
    (tmp_path / "a.csv").write_text('text\n甲\n"乙\n丙\n丁\n', encoding="utf-8")
    skipped = Skipped()
    assert list(read_texts([tmp_path / "a.csv"], on_bad=skipped)) == ["甲"]
    assert "unexpected end of data; the rest of it is not read" in skipped.first[0]


def test_a_summary_alone_makes_no_encyclopedia(tmp_path):
    turns = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]
    rows = [
        {"summary": "概要", "messages": turns},
        {"title": "题", "summary": "概要", "content": "正文"},
    ]
    write_rows(tmp_path / "a.jsonl", rows)
    assert list(read_rows([tmp_path / "a.jsonl"])) == rows
    write_rows(tmp_path / "b.jsonl", [{"text": "", "instruction": "问", "output": "答"}])
    assert list(read_rows([tmp_path / "b.jsonl"])) == [{"instruction": "问", "output": "答"}]


def test_what_is_an_input_is_not_overwritten(tmp_path):
    """A named input was once left out without a word, and then replaced."""
    from nanophi.text import dedup

    for name, text in (
        ("a", "甲。"),
        ("b", "乙。"),
        ("news-00000", "丙。"),
        ("news-00001", "丁。"),
    ):
        write_rows(tmp_path / f"{name}.jsonl", [{"text": text}])
    a, b, news = (str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "news.jsonl"))
    with pytest.raises(UserError, match=r"b\.jsonl is an input and would be overwritten"):
        dedup.main(dedup.Config(input=[a, b], out=b))
    assert (
        dedup.main(dedup.Config(input=[str(tmp_path / "news-*.jsonl")], out=news))["written"] == 2
    )
    assert dedup.main(dedup.Config(input=[str(tmp_path)], out=news))["read"] == 4
    with pytest.raises(
        UserError,
        match=r"news-00000\.jsonl is there, and .*news\.jsonl\.settings does not say whence",
    ):
        clean.main(clean.Config(input=[str(tmp_path)], out=news, shard_rows=10))
    with pytest.raises(UserError, match=r"news-00000\.jsonl is there already"):
        main(Config(input=[a], out=news, rows_per_file=1))
    assert (
        main(Config(input=[str(tmp_path)], out=news))
        == main(Config(input=[str(tmp_path)], out=news))
        == 4
    )


def test_nothing_to_read_leaves_the_old_output(tmp_path):
    from nanophi.text import dedup

    (tmp_path / "empty.jsonl").touch()
    kept = tmp_path / "kept.jsonl"
    write_rows(kept, ROWS)
    for command in (dedup, corpus):
        with pytest.raises(UserError, match=r"nothing to read|there is no row to write"):
            command.main(command.Config(input=[str(tmp_path / "empty.jsonl")], out=str(kept)))
    assert list(read_rows([kept])) == ROWS


def test_txt_documents_end_at_blank_lines():
    file = io.StringIO()
    write_txt(file, [{"text": "一\n\n二"}, {"text": "三"}])
    assert list(formats.split_text(io.StringIO(file.getvalue()), "paragraph")) == ["一\n二", "三"]
