"""Ray Data makes the shards of the commands, to the byte."""

import json
import random
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("ray")

import pyarrow as pa
import ray

from examples import ray_text
from nanophi.cli import UserError
from nanophi.text import clean, dedup, shards
from nanophi.text.corpus import read_rows
from nanophi.tokenizer.bpe import train_bpe
from tests.text.test_dedup import random_text, similar_to

DOCUMENTS = Path(__file__).resolve().parents[2] / "data" / "demo" / "documents.jsonl"

# When Ray Data makes its context, it warns of defaults that it sets itself.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:`{name}` is deprecated:DeprecationWarning")
    for name in ("use_push_based_shuffle", "use_polars", "use_arrow_tensor_v2")
]


def planted() -> list[dict]:
    """The demo's documents, shuffled among copies: some the same, some nearly, some in markup."""
    rows = list(read_rows([DOCUMENTS]))
    rng = random.Random(0)
    for row in list(rows):
        text = row["text"]
        place = rng.randrange(len(text))
        copies = [
            text,
            f"{text[:place]}改{text[place + 1 :]}",
            text[: len(text) * 4 // 5],  # on both sides of the threshold
            f"<p>{text}</p>",
        ]
        rows += [{"text": copy} for copy in copies if rng.random() < 0.2]
    rng.shuffle(rows)
    return rows


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Some hundred rows in files. One is empty, one has a bad row, one says nothing new."""
    folder = tmp_path_factory.mktemp("raw")
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in planted()]
    for number in range(4):
        text = "".join(lines[number::4]) + ("{bad\n" if number == 2 else "")
        (folder / f"{number}.jsonl").write_text(text, encoding="utf-8")
    (folder / "1-empty.jsonl").write_text("", encoding="utf-8")
    shutil.copy(folder / "0.jsonl", folder / "3-again.jsonl")
    return str(folder)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe([row["text"] for row in read_rows([DOCUMENTS])], vocab_size=600).save(folder)
    return str(folder)


@pytest.fixture
def local_ray(monkeypatch):
    """Ray ends with the test, asks nobody, and leaves nothing in the home or in /tmp.

    Ray's workers run at niceness 15. Beside programs that kept every core busy they got a hundredth
    of one: the test waited for minutes for a task of a second, and seemed to hang.
    """
    # The paths of its sockets may have 107 characters: tmp_path has too many, and so may TMPDIR.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # otherwise a token in ~/.ray
        monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        monkeypatch.setenv("RAY_worker_niceness", "0")
        monkeypatch.delenv("RAY_ADDRESS", raising=False)  # that of another cluster
        yield
        ray.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_shards_are_those_of_the_commands(workers, raw, tokenizer, local_ray, tmp_path, capfd):
    cleaned = str(tmp_path / "clean.jsonl")
    counts = clean.main(clean.Config(input=[raw], out=cleaned, dedup=True))
    assert counts["repeated"] > 200
    common = {"tokenizer": tokenizer, "val_fraction": 0.1}
    shards.main(shards.Config(input=[cleaned], out=str(tmp_path / "plain"), **common))
    out = tmp_path / "ray"
    (out / "new.tmp").mkdir(parents=True)
    (out / "new.tmp" / "train-00007.bin").write_bytes(b"what a killed command has left")
    ray_text.main(ray_text.Config(input=[raw], out=str(out), workers=workers, **common))
    assert ray.cluster_resources()["CPU"] == workers
    expected = {path.name: path.read_bytes() for path in (tmp_path / "plain").iterdir()}
    assert {path.name: path.read_bytes() for path in out.iterdir()} == expected
    assert set(expected) == {"train-00000.bin", "val-00000.bin"}
    assert f"{counts['repeated']:,} duplicates dropped" in capfd.readouterr().out


@pytest.mark.slow
def test_nothing_to_drop_and_nothing_at_all(tokenizer, local_ray, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "春天来了"}\n{"text": "怎样泡茶"}\n', "utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": " "}\n', "utf-8")
    common = {"tokenizer": tokenizer, "out": str(tmp_path / "out"), "val_fraction": 0.0}
    ray_text.main(ray_text.Config(input=[str(tmp_path / "a.jsonl")], workers=1, **common))
    assert len(shards.TokenSet(tmp_path / "out", "train")) == 2
    with pytest.raises(UserError, match="no document is left"):
        ray_text.main(ray_text.Config(input=[str(tmp_path / "b.jsonl")], **common))


# ---- without Ray


def test_workers_are_refused_where_a_ray_runs_already(monkeypatch):
    """It was the traceback of a ValueError that spoke of num_cpus."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(UserError, match="leave --workers out"):
        ray_text.start(workers=2)


def sketched(texts, threshold):
    """The table of documents that `read` makes; numbers have gaps, as those of several files."""
    digests, keys = dedup.sketch(texts, *dedup.bands_and_rows(threshold))
    numbers = np.arange(len(texts)) + (np.arange(len(texts)) // 50 << 32)
    columns = {"number": numbers, "text": texts, "digest": digests}
    columns |= {"keys": [key.tobytes() for key in keys]}
    return pa.table(columns | {"part": [digest[0] % ray_text.PARTS for digest in digests]})


def by_part(data, names, work, **how):
    """What Ray does there, in one process."""
    parts = data["part"].to_numpy()
    tables = [work(data.filter(parts == part), **how) for part in np.unique(parts)]
    return [np.concatenate([rows[name].to_numpy() for rows in tables]) for name in names]


@pytest.mark.parametrize("threshold", [0.5, 0.8, 1.0])
def test_the_steps_drop_what_dedup_drops(threshold, monkeypatch):
    """Chains, repetitions of what is dropped, and a run of more than dedup.RUN alike texts, of
    which not every pair is compared.
    """
    texts = [random_text(i, 300) for i in range(60)]
    for seed in range(200):
        texts.append(similar_to(texts[seed], 0.5 + seed % 50 / 100, 1000 + seed))
    texts += [*texts[::5], "！", "", "好"]
    page = random_text(5000, 300)
    texts += [page[:-8] + random_text(6000 + i, 8) for i in range(300)]
    random.Random(0).shuffle(texts)
    documents = sketched(texts, threshold)
    held = SimpleNamespace(table=documents, select_columns=documents.select)
    monkeypatch.setattr(ray_text, "mapped", lambda data, work, **how: work(data.table, **how))
    monkeypatch.setattr(ray_text, "by_part", by_part)
    dropped = ray_text.duplicates(held, threshold)
    numbers = documents["number"].to_numpy()
    assert sorted(dropped) == numbers[dedup.near_duplicates(texts, threshold)].tolist()
    assert len(dropped) > 50


def test_chains_are_groups():
    order = np.random.default_rng(0).permutation(1000)
    chain = np.sort(np.stack([order[:-1], order[1:]], axis=1), axis=1)
    pairs = np.concatenate([chain, chain + 2000])
    numbers, groups = ray_text.linked(pairs[np.lexsort(pairs.T[::-1])])
    assert numbers.tolist() == [*range(1000), *range(2000, 3000)]
    assert groups.tolist() == [0] * 1000 + [1000] * 1000
