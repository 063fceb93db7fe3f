"""The door to outputs: nothing that matters is overwritten, and two commands never write one thing.

Each command is called with a tiny input; what it must not touch is compared byte for byte.
"""

import fcntl
import os
from contextlib import contextmanager
from pathlib import Path

import pytest

import train_tokenizer
from nanophi.claims import Lock, Output, claim
from nanophi.cli import UserError
from nanophi.infer import pairs
from nanophi.text import clean, corpus, dedup, shards, stats
from nanophi.train import plot

from .conftest import TEXTS, write


@pytest.fixture
def rows(tmp_path):
    return write(tmp_path / "rows.jsonl", [{"text": text} for text in TEXTS])


@contextmanager
def another_process(lock: Path):
    """Hold a lock as another process does, whose number is 4711."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w") as file:
        file.write("4711\n")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def commands(rows: str, out: Path, tokenizer: Path) -> dict:
    """Each command that reads rows, made to write into `out`."""
    return {
        "clean": lambda: clean.main(clean.Config(input=[rows], out=f"{out}/o.jsonl")),
        "clean --dropped": lambda: clean.main(
            clean.Config(input=[rows], out=f"{out}/other.jsonl", dropped=f"{out}/o.jsonl")
        ),
        "clean --shard-rows": lambda: clean.main(
            clean.Config(input=[rows], out=f"{out}/o.jsonl", shard_rows=5)
        ),
        "corpus": lambda: corpus.main(corpus.Config(input=[rows], out=f"{out}/o.jsonl")),
        "dedup": lambda: dedup.main(dedup.Config(input=[rows], out=f"{out}/o.jsonl")),
        "dedup --clusters": lambda: dedup.main(
            dedup.Config(input=[rows], out=f"{out}/other.jsonl", clusters=f"{out}/o.jsonl")
        ),
        "stats": lambda: stats.main(
            stats.Config(input=[rows], plot=f"{out}/o.png", duplicates=False)
        ),
        "shards": lambda: shards.main(
            shards.Config(input=[rows], tokenizer=str(tokenizer), out=str(out))
        ),
        "train_tokenizer": lambda: train_tokenizer.main(
            train_tokenizer.Config(input=[rows], out=str(out), vocab_size=300, report=False)
        ),
    }


NAMES = list(commands("", Path(), Path()))


@pytest.fixture(scope="module")
def tokenizer(tok, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tok.save(folder)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_the_second_writer_is_told_who_writes(rows, tokenizer, tmp_path, name):
    """Two `clean` into one file both ended well, and the file of one held the rows of the other."""
    out = tmp_path / "out"
    is_folder = name in ("shards", "train_tokenizer")
    file = "o.png" if name == "stats" else "o.jsonl"
    lock = out / ".lock" if is_folder else out / f"{file}.lock"
    with another_process(lock), pytest.raises(UserError, match="written by process 4711"):
        commands(rows, out, tokenizer)[name]()
    commands(rows, out, tokenizer)[name]()  # the lock of a process that has ended is no obstacle
    assert not list(out.rglob("*.lock"))


def test_pairs_and_pictures_are_locked_too(house, tmp_path):
    out = f"{tmp_path}/o"
    model, data = f"{house}/sft", [f"{house}/sft.jsonl"]
    commands = {
        "o.jsonl": lambda: pairs.main(pairs.Config(model=model, data=data, out=f"{out}.jsonl")),
        "o.png": lambda: plot.main(plot.Config(runs=[model], out=f"{out}.png")),
        "o.json": lambda: plot.main(
            plot.Config(runs=[model], out=f"{out}.png", reference=f"{out}.json")
        ),
    }
    for name, command in commands.items():
        with (
            another_process(tmp_path / f"{name}.lock"),
            pytest.raises(UserError, match="written by process 4711"),
        ):
            command()
        (tmp_path / f"{name}.lock").unlink()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_refused_command_leaves_nothing(tokenizer, tmp_path, name):
    """Not even the directory that it would have made."""
    empty = write(tmp_path / "rows.jsonl", [])
    before = tree(tmp_path)
    with pytest.raises(UserError):
        commands(empty, tmp_path / "new" / "out", tokenizer)[name]()
    assert tree(tmp_path) == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "make",
    [
        lambda rows: clean.Config(input=[rows], out=rows),
        lambda rows: clean.Config(input=[rows], out=rows + ".gz", dropped=rows),
        lambda rows: dedup.Config(input=[rows], out=rows + ".gz", clusters=rows),
        lambda rows: dedup.Config(input=[rows], out=rows + ".gz", clusters=rows + ".gz"),
        lambda rows: corpus.Config(input=[rows], out=rows),
        lambda rows: stats.Config(input=[rows], plot=rows),
        lambda rows: stats.Config(input=[rows], plot=str(Path(rows).parent / "c.doc")),
        lambda rows: dedup.Config(input=[rows], out=rows + ".gz", clusters=rows + ".doc"),
    ],
)
def test_no_output_overwrites_an_input_or_another_output(rows, make):
    """`stats --plot r.jsonl --input r.jsonl` replaced the corpus by a picture, without a word;
    `dedup --clusters c.doc` failed after all its passes.
    """
    cfg = make(rows)
    before = tree(Path(rows).parent)
    command = {clean.Config: clean, dedup.Config: dedup, corpus.Config: corpus}
    with pytest.raises(UserError):
        command.get(type(cfg), stats).main(cfg)
    assert tree(Path(rows).parent) == before


def test_an_input_is_known_by_a_link_too(rows, tmp_path):
    (tmp_path / "link.jsonl").symlink_to(rows)
    with pytest.raises(UserError, match="would be overwritten"):
        dedup.main(dedup.Config(input=[rows], out=str(tmp_path / "link.jsonl")))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.png", b'{"text": 1}'),
        ("a.jsonl", b"\x89PNG"),
        ("a.jsonl", b"# notes of mine"),
        ("a.json", b'{"version": 1}'),
        ("a.txt", b"\x7fELF\0\0"),
        ("a.jsonl.gz", b'{"text": 1}'),
        ("metrics.jsonl", b'{"step": 1}'),
        ("config.json", b"[]"),
    ],
)
def test_a_file_of_another_kind_is_not_overwritten(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with (
        pytest.raises(UserError, match=r"another kind|model, tokenizer or run"),
        claim([], Output("--out", path)),
    ):
        pass
    assert path.read_bytes() == content


def test_what_cannot_be_written_at_the_end_is_refused_at_once(rows, tmp_path):
    """`train_tokenizer --out a-file` said so after the training."""
    cfg = train_tokenizer.Config(input=[rows], out=f"{rows}.gz", vocab_size=300)
    Path(cfg.out).write_bytes(b"")
    with pytest.raises(UserError, match=r"--out .* is a file: name a directory"):
        train_tokenizer.main(cfg)
    with pytest.raises(UserError, match="is a file and no directory"):
        clean.main(clean.Config(input=[rows], out=f"{rows}/below/o.jsonl"))
    for empty in ("", " "):
        with pytest.raises(UserError, match="empty"):
            clean.main(clean.Config(input=[empty], out="o.jsonl"))


def test_a_tokenizer_is_replaced_only_where_that_is_meant(rows, tokenizer, tmp_path):
    """Over the tokenizer of a model it ended well, and the model's ids then meant other tokens."""
    cfg = train_tokenizer.Config(input=[rows], out=str(tmp_path), vocab_size=300, report=False)
    train_tokenizer.main(cfg)
    with pytest.raises(UserError, match=r"holds a tokenizer.*--overwrite"):
        train_tokenizer.main(cfg)
    cfg.overwrite = True
    train_tokenizer.main(cfg)
    (tmp_path / "config.json").write_text("{}")
    before = tree(tmp_path)
    with pytest.raises(UserError, match="holds a model or run"):
        train_tokenizer.main(cfg)
    with pytest.raises(UserError, match="holds a model or run"):
        shards.main(shards.Config(input=[rows], tokenizer=str(tokenizer), out=str(tmp_path)))
    assert tree(tmp_path) == before


def test_a_directory_of_inputs_is_read_without_models_and_leftovers(tok, tmp_path):
    """A killed `clean --dedup` left a folder with rows, which the next command read as input; and a
    run inside of the data directory was read as data when it was resumed.
    """
    write(tmp_path / "rows.jsonl", [{"text": "一"}])
    tok.save(tmp_path / "run")
    for name in ("config.json", "run.json", "metrics.jsonl"):
        write(tmp_path / "run" / name, [{"text": "不是文章"}])
    (tmp_path / "o.jsonl.tmp").mkdir()
    write(tmp_path / "o.jsonl.tmp" / "o-00000.jsonl", [{"text": "剩下的"}])
    write(tmp_path / "o.jsonl.4711-1.tmp", [{"text": "剩下的"}])
    assert list(corpus.read_texts([str(tmp_path)])) == ["一"]


def test_the_files_of_a_tokenizer_in_the_input_directory_are_not_read_again(tmp_path):
    write(tmp_path / "rows.jsonl", [{"text": text} for text in TEXTS])
    cfg = train_tokenizer.Config(
        input=[str(tmp_path)], out=str(tmp_path / "t"), vocab_size=300, overwrite=True
    )
    first = train_tokenizer.main(cfg)
    assert train_tokenizer.main(cfg) == first


def test_a_process_takes_over_its_own_lock(tmp_path):
    """In a notebook, a cell that failed keeps what it held; the next run must not wait for it."""
    first = Lock(tmp_path / "run", folder=True)
    second = Lock(tmp_path / "run", folder=True)
    assert (tmp_path / "run" / ".lock").read_text() == f"{os.getpid()}\n"
    first.release()  # it holds nothing any more
    assert (tmp_path / "run" / ".lock").exists()
    second.release()
    assert not (tmp_path / "run").exists()  # it was made for the lock, and is empty


def test_numbered_files_are_replaced_as_a_set(tmp_path):
    """`clean --shard-rows` deleted the shards of the run before first: with other limits, which
    drop all rows, five empty files were left, and after a bad row nothing.
    """
    rows = write(tmp_path / "rows.jsonl", [{"text": f"第{n}天，天气很好。"} for n in range(12)])
    settings = {"input": [rows], "out": str(tmp_path / "o.jsonl"), "shard_rows": 5}
    clean.main(clean.Config(**settings))
    before = tree(tmp_path)
    assert len(before) == 5  # rows, three shards, settings
    with pytest.raises(UserError, match="all are dropped"):
        clean.main(clean.Config(**settings, min_length=10_000))
    write(tmp_path / "rows.jsonl", [{"text": "一二三四五六七八九十。"}, {"text": 5}])
    with pytest.raises(UserError, match="should be a string"):
        clean.main(clean.Config(**settings, strict=True))
    after = tree(tmp_path)
    assert {name: after[name] for name in before if "rows" not in name} == {
        name: before[name] for name in before if "rows" not in name
    }
