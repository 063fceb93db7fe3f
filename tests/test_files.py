"""A file appears when it is complete, a set all together, and nothing of a killed writer stays."""

import errno
import json
import os
import stat

import pytest

from nanophi.cli import UserError
from nanophi.files import READY, FileSet, finish, replacing, together, write_json, write_text


def names(folder):
    return sorted(os.listdir(folder))


def test_two_writers_of_one_file_do_not_share_a_temporary_file(tmp_path):
    """Both wrote `p.tmp`: when the first was ready, what the second had written so far, half of its
    content, appeared under the final name.
    """
    path = tmp_path / "p"
    second = replacing(path)
    with replacing(path) as beside:
        beside.write_text("A" * 20)
        half = second.__enter__()
        half.write_text("BB")
    assert path.read_text() == "A" * 20
    half.write_text("BBBB")
    second.__exit__(None, None, None)
    assert path.read_text() == "BBBB"
    assert names(tmp_path) == ["p"]


def test_the_temporary_file_of_a_killed_writer_goes_with_the_next_one(tmp_path):
    """A killed command left `p.tmp` for good when nobody wrote the same name again in the same way.
    The file of a writer that is alive stays.
    """
    (tmp_path / "p.4711-1.tmp").write_text("of a killed one")
    (tmp_path / "p.jsonl.4711-1.tmp").write_text("of another name")
    with replacing(tmp_path / "p") as alive:
        alive.write_text("A")
        write_text(tmp_path / "p", "B")
        assert names(tmp_path) == ["p", alive.name, "p.jsonl.4711-1.tmp"]
    assert names(tmp_path) == ["p", "p.jsonl.4711-1.tmp"]


def test_a_replaced_file_keeps_its_permissions_and_a_link_stays_a_link(tmp_path):
    """The new file took the place of the link, and a private file could be read by everybody."""
    (tmp_path / "real").write_text("old")
    (tmp_path / "real").chmod(0o600)
    (tmp_path / "link").symlink_to("real")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    assert stat.S_IMODE((tmp_path / "real").stat().st_mode) == 0o600


@pytest.mark.parametrize("kind", ["folder", "pipe", "loop"])
def test_what_is_no_regular_file_is_never_replaced(tmp_path, kind):
    """For root, `--out /dev/null` would have made a file of the device."""
    path = tmp_path / kind
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path)
    with pytest.raises(UserError, match="name a file to write"):
        write_text(path, "x")


def test_a_set_appears_together_or_not_at_all(tmp_path):
    write_text(tmp_path / "a", "old")
    with together(tmp_path) as files:
        write_text(tmp_path / "a", "new")
        write_text(tmp_path / "b", "new")
        files.delete(tmp_path / "c")
        assert (tmp_path / "a").read_text() == "old"
        assert not (tmp_path / "b").exists()
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text() == "new"

    def write_one_of_two():
        with together(tmp_path), together():  # a block within another one joins it
            write_text(tmp_path / "a", "half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_one_of_two()
    assert (tmp_path / "a").read_text() == "new"
    assert names(tmp_path) == ["a", "b"]


def test_a_kill_between_two_renames_is_made_good(tmp_path, monkeypatch):
    """Shards were replaced one by one: a kill left old and new ones side by side."""
    write_text(tmp_path / "a", "old")
    write_text(tmp_path / "gone", "old")

    def killed_half_way(self):
        os.replace(self.directory / self.renames[0][0], self.directory / self.renames[0][1])
        raise KeyboardInterrupt

    def write_three():
        with together(tmp_path) as files:
            write_text(tmp_path / "a", "new")
            write_text(tmp_path / "b", "new")
            files.delete(tmp_path / "gone")

    with monkeypatch.context() as patch:
        patch.setattr(FileSet, "do", killed_half_way)
        with pytest.raises(KeyboardInterrupt):
            write_three()
    assert not (tmp_path / "b").exists()
    finish(tmp_path)
    finish(tmp_path)  # a second reader finds nothing to do
    assert (tmp_path / "b").read_text() == "new"
    assert names(tmp_path) == ["a", "b"]


@pytest.mark.parametrize(
    "plan",
    [
        {"renames": [["x.tmp", "../outside"]], "deletions": []},
        {"renames": [], "deletions": ["../outside"]},
        {"renames": [], "deletions": ["/etc/passwd"]},
        {"renames": [["x.tmp"]], "deletions": 5},
        [],
    ],
)
def test_a_hostile_list_of_renames_touches_nothing_outside(tmp_path, plan):
    """A checkpoint directory may come from anywhere, and with it such a list."""
    outside = tmp_path / "outside"
    outside.write_text("mine")
    folder = tmp_path / "downloaded"
    folder.mkdir()
    (folder / READY).write_text(json.dumps(plan))
    with pytest.raises(UserError, match=r"ready\.tmp"):
        finish(folder)
    assert outside.read_text() == "mine"


def test_names_that_are_no_text_can_be_written(tmp_path):
    """run.json holds --out; a name with the byte FF ended the run in a UnicodeEncodeError."""
    write_json(tmp_path / "run.json", {"out": "x\udcff"})
    assert json.loads((tmp_path / "run.json").read_text()) == {"out": "x\udcff"}


def test_a_full_disk_names_the_file(tmp_path):
    """It said `[Errno 28] No space left on device`, and nobody knew of what."""

    def write():
        with replacing(tmp_path / "a"):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space") as caught:
        write()
    assert caught.value.filename == str(tmp_path / "a")
    assert not list(tmp_path.iterdir())
