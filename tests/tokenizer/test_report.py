"""vocab.tsv can be read by people, and the report adds up."""

import csv

import pytest

import train_tokenizer
from nanophi.tokenizer.bpe import train_bpe
from nanophi.tokenizer.report import describe, draw_lengths, report, script_of, write_vocabulary
from tests.conftest import TEXTS


@pytest.fixture(scope="module", params=["byte", "char"])
def tok(request):
    return train_bpe(TEXTS, 600, level=request.param, byte_fallback=request.param == "char")


def test_vocabulary_is_readable_chinese(tok, tmp_path):
    """The original's users asked why there is no Chinese in the vocabulary.

    They saw GPT-2's stand-in characters.
    """
    tok.add_tokens(["<工具>"])
    write_vocabulary(tok, tmp_path / "vocab.tsv")
    with open(tmp_path / "vocab.tsv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert [int(row["id"]) for row in rows] == list(range(len(tok)))
    assert all(bytes.fromhex(row["bytes"]) == tok.id_to_bytes[int(row["id"])] for row in rows)
    by_text = {row["text"]: row for row in rows}
    assert by_text["[EOS]"]["kind"] == "special"
    assert by_text["<工具>"]["kind"] == "added"
    assert by_text["风筝"]["kind"] == "merge"
    torn = "<E9><A3><8E><E7><AD> + <9D>"  # at byte level a merge may end inside a character
    assert by_text["风筝"]["merge"] == (torn if tok.level.name == "byte" else "风 + 筝")
    assert by_text["风筝"]["count"] == "6"
    assert "\\n" in by_text
    assert {row["kind"] for row in rows} >= {"special", "byte", "merge"}


def test_scripts():
    assert [script_of(text) for text in ("感冒", " the", "3.", "……", "\n\n", "第1", "12")] == [
        "Han", "Latin", "mixed", "punctuation", "space", "mixed", "digits",
    ]  # fmt: skip


def test_report_counts_every_token(tok):
    text = report(tok, TEXTS)
    total = sum(len(tok.encode(t)) for t in TEXTS)
    all_line = next(line for line in text.splitlines() if line.startswith("all "))
    assert all_line.split()[1] == f"{total:,}"
    assert float(all_line.split()[2]) == pytest.approx(sum(map(len, TEXTS)) / total, abs=0.01)
    assert "come back unchanged: tab, line breaks, spaces, emoji" in text
    if tok.level.name == "byte":
        assert "changed: " not in text.replace("unchanged", "")
        assert describe(tok, tok.encode("鱻")[0])[1] == "part of a character"


def test_picture(tok, tmp_path):
    draw_lengths(tok, tmp_path / "lengths.png")
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_max_memory_samples_documents(tmp_path, capsys):
    """The same documents each time, whatever their order, and the share is said."""
    texts = [f"第{i}篇文章，讲的是第{i * 7 % 13}件事。" for i in range(3000)]
    for name, order in (("a", texts), ("b", texts[::-1])):
        (tmp_path / f"{name}.txt").write_text("\n".join(order), encoding="utf-8")
        cfg = train_tokenizer.Config(
            input=[str(tmp_path / f"{name}.txt")],
            out=str(tmp_path / name),
            vocab_size=400,
            max_memory=0.3000001,
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_tokenizer, "FACTOR", 1e-3)
            assert train_tokenizer.main(cfg)["characters"] < sum(map(len, texts)) / 2
        assert "% of the documents" in capsys.readouterr().out
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (
        tmp_path / "b" / "tokenizer.json"
    ).read_bytes()
