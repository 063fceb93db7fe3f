"""Long commands, killed at random moments: the rerun gives the bytes of an unbroken run, nothing is
left over, and no process goes on. And two of them at once on one output: one works, one is told.
"""

import os
import random
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from nanophi.train.losses import PREFERENCE_LOSSES

from .conftest import PREFERENCES, SFT, write

ROOT = Path(__file__).resolve().parents[1]
KILLS = 20
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
MARK = "NANOPHI_KILL_TEST"  # in the environment of every process of one run

TEXT = {
    "tokenizer": "train_tokenizer.py --input many.jsonl --out out/t --vocab-size 600",
    "clean": "-m nanophi.text.clean --input many.jsonl --out out/o.jsonl --dropped out/d.jsonl "
    "--dedup --workers 2",
    "clean numbered": "-m nanophi.text.clean --input many.jsonl --out out/o.jsonl "
    "--shard-rows 1000 --workers 2 --resume",
    "dedup": "-m nanophi.text.dedup --input many.jsonl --out out/o.jsonl.gz "
    "--clusters out/c.jsonl --workers 2",
    "shards": "-m nanophi.text.shards --input many.jsonl --tokenizer house/tokenizer "
    "--out out/tokens --workers 2",
}
MODEL = {
    "sft": "sft.py --init-from house/pretrain --data sft.jsonl --out out/run --steps 40 "
    "--warmup 0 --batch-tokens 128 --save-every 5 --device cpu --resume auto",
    "pairs": "-m nanophi.infer.pairs --model house/pretrain --data sft.jsonl --out out/p.jsonl "
    "--max-new-tokens 100 --similar 1 --device cpu",
    "evaluate": "-m nanophi.infer.evaluate --model house/sft --data many.jsonl --documents 200 "
    "--device cpu",
}
DPO = {
    f"dpo {loss}": "dpo.py --init-from house/sft --data dpo.jsonl --out out/run --steps 20 "
    f"--warmup 0 --batch-pairs 2 --save-every 5 --device cpu --resume auto --loss {loss} "
    "--share-prompt on"
    for loss in PREFERENCE_LOSSES
}
COMMANDS = TEXT | MODEL | DPO
GOES_ON = {"clean numbered", "sft", *DPO}  # what these leave, they read when they go on
AGAIN = {"tokenizer": " --overwrite"}
# Files that hold times: they differ from run to run.
TIMED = ("metrics.jsonl", "train_state.pt", "run.json", "events.out")


@pytest.fixture(scope="module")
def work(house, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    (folder / "house").symlink_to(house)
    dice = random.Random(0)
    letters = "春夏秋冬天地人山水火木金土日月星云风雨雪花草树鸟鱼虫"
    rows = [{"text": "".join(dice.choices(letters, k=60)) + "。"} for _ in range(6000)]
    write(folder / "many.jsonl", rows + rows[:500])
    write(folder / "sft.jsonl", SFT)
    write(folder / "dpo.jsonl", PREFERENCES)
    return folder


def start(command: str, folder: Path, mark: str) -> subprocess.Popen:
    script, _, rest = command.partition(" ")
    words = ["-m", *rest.split()] if script == "-m" else [str(ROOT / script), *rest.split()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), MARK: mark}
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def processes_of(mark: str) -> list[str]:
    """The processes that a command has started and that still run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            is_dead = folder.joinpath("stat").read_text().rpartition(")")[2].split()[0] == "Z"
            if not is_dead and mark.encode() in folder.joinpath("environ").read_bytes():
                found.append(folder.joinpath("cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


def result(folder: Path, output: bytes) -> dict[str, bytes]:
    """What a run has made; for `evaluate`, which writes nothing, what it has printed."""
    made = {}
    for path in (folder / "out").rglob("*"):
        if path.is_file() and not path.name.startswith(TIMED):
            made[str(path.relative_to(folder))] = path.read_bytes()
    return made or {"printed": output}


def clear(folder: Path) -> None:
    subprocess.run(["rm", "-rf", folder / "out"], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_command_can_be_run_again(work, name):
    command = COMMANDS[name]
    clear(work)
    began = time.monotonic()
    unbroken = start(command, work, "none")
    output, errors = unbroken.communicate(timeout=600)
    assert unbroken.returncode == 0, errors
    whole_s = time.monotonic() - began
    expected = result(work, output)

    dice = random.Random(name)
    stopped = 0
    number = 0
    while stopped < KILLS:
        number += 1
        assert number < 4 * KILLS, f"only {stopped} of {number} were stopped before their end"
        if number % 2:  # every second time an older result is there, which must not suffer
            again = command + AGAIN.get(name, "")
        else:
            clear(work)
            again = command
        mark = uuid.uuid4().hex
        process = start(again, work, mark)
        time.sleep(dice.random() * whole_s)
        sent = dice.choice(SIGNALS)
        process.send_signal(sent)
        process.communicate(timeout=600)
        if process.returncode == 0:  # it was faster than the unbroken one
            whole_s *= 0.8
        else:
            stopped += 1
        place = f"kill {number} by {sent.name}, which gave {process.returncode}"
        wait_until_alone(mark, place)
        if sent is not signal.SIGKILL and name not in GOES_ON:
            assert not leftovers(work), place

        rerun = start(command + AGAIN.get(name, ""), work, mark)
        output, errors = rerun.communicate(timeout=600)
        assert rerun.returncode == 0, f"{place}: {errors.decode()}"
        assert result(work, output) == expected, place
        assert not leftovers(work), place


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "evaluate"])
def test_of_two_at_once_one_works(work, name):
    """Both ended well, and the files of one held what the other had written. (`evaluate` writes
    nothing.)
    """
    command = COMMANDS[name]
    clear(work)
    output, errors = start(command, work, "none").communicate(timeout=600)
    expected = result(work, output)
    clear(work)
    both = [start(command, work, "none") for _ in range(2)]
    ends = [(process.communicate(timeout=600), process) for process in both]
    ends.sort(key=lambda end: end[1].returncode)
    (_, first), ((_, errors), second) = ends
    assert (first.returncode, second.returncode) == (0, 2), errors.decode()
    assert f"is being written by process {first.pid}: wait" in errors.decode()
    assert result(work, output) == expected
    assert not leftovers(work)


def leftovers(folder: Path) -> list[str]:
    names = [str(path) for path in folder.rglob("*") if path.name.endswith((".tmp", ".lock"))]
    return names


def wait_until_alone(mark: str, place: str) -> None:
    """Workers of a killed process end by themselves, within moments."""
    for _ in range(200):
        if not processes_of(mark):
            return
        time.sleep(0.1)
    raise AssertionError(f"{place}: still there {processes_of(mark)}")
