"""A corpus is counted by source, and what is repeated in it."""

import pytest

from nanophi.cli import UserError
from nanophi.text.corpus import write_rows
from nanophi.text.stats import Config, main


def test_a_corpus_is_counted(tmp_path, capsys):
    texts = [
        "今天天气很好，我们去公园。",
        "今天天气很好，我们去公园！",
        "Linux 6.1 已经发布。",
        "一二三",
    ]
    write_rows(
        tmp_path / "a.jsonl",
        [{"text": text, "source": "ab"[i // 2]} for i, text in enumerate(texts)],
    )
    groups = main(Config(input=[str(tmp_path / "a.jsonl")], plot=str(tmp_path / "a.png")))
    assert {name: list(group.lengths) for name, group in groups.items()} == {
        "a": [13, 13],
        "b": [15, 3],
    }
    shares = {name: round(16 * share) for name, share in groups["b"].scripts().items()}
    assert shares == {"Han": 7, "Latin": 5, "digits": 2, "punctuation": 2, "other": 0}
    printed = capsys.readouterr().out
    assert "repeated or nearly repeated: 1 documents (25.0%), in 1 clusters" in printed
    assert "100 %: 15" in printed
    assert (tmp_path / "a.png").stat().st_size > 5000
    (tmp_path / "b.jsonl").touch()
    with pytest.raises(UserError, match="no text in"):
        main(Config(input=[str(tmp_path / "b.jsonl")]))
