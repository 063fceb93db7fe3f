"""Foreign and damaged files, by the thousand, through the commands that read them.

Each mutation of a file ends in exit code 2 and one line, or in a result. None ends in a traceback,
changes a file, leaves one, or takes longer than 20 seconds. Seeds are fixed and stand in the
message of a failure, so that it can be repeated:

    FUZZ="config.json 4711" python -m pytest tests/test_fuzz.py
"""

import csv
import io
import json
import os
import random
import time
import warnings
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch

import generate
import pretrain
import sft
from nanophi.cli import run_command
from nanophi.model import checkpoint
from nanophi.text import clean
from nanophi.train import plot, preflight

from .conftest import SFT, TEXTS, tiny_model, write

FEW = 40  # mutations of each file in every run of the tests
MANY = 10_000
LONGEST_S = 20
ODD = [
    *(None, True, False, 0, -1, 1, 2, 3, 0.5, -0.0, 2**31, 2**63, 10**400, 1e308, float("nan")),
    *(float("inf"), "", "x", "64", "\ud83d", "../x", "/", "你", "a" * 10_000, [], {}, [[]], [None]),
    *({"a": {}}, {"": 0}, ["x"], [0, -1], [1e308]),
]
ODD_BYTES = [
    *(b"\0", b"\xff", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b"\r", b'"', b",", b"{", b"}"),
    *(b"[" * 3000, b"\t", b";"),
    *(b"1e999", b"9" * 5000, b"NaN", b"null", b"\\ud83d", b"\xd6\xd0", "你".encode()),
]


# ---- mutations


def mutated_bytes(raw: bytes, dice: random.Random) -> bytes:
    """A few bytes flipped, cut, repeated, moved or put in."""
    data = bytearray(raw)
    for _ in range(dice.choice((1, 1, 1, 2, 5))):
        at = dice.randrange(len(data) + 1)
        end = min(len(data), at + dice.choice((1, 2, 8, 100)))
        kind = dice.randrange(7)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << dice.randrange(8)
        elif kind == 1:
            del data[at:end]
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            data[at:at] = data[at:end]
        elif kind == 4:
            data[at:at] = dice.choice(ODD_BYTES)
        elif kind == 5:
            data[at:end] = dice.choice(ODD_BYTES)
        else:
            data[at:end] = dice.randbytes(end - at)
    return bytes(data)


def mutated_value(value, dice: random.Random):
    """A nested dict or list with an entry replaced, deleted, renamed, repeated or moved."""
    if dice.random() < 0.02:
        return dice.choice(ODD)
    value = {**value} if isinstance(value, dict) else list(value)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    if not keys:
        return dice.choice(ODD)
    key = dice.choice(keys)
    if isinstance(value[key], dict | list) and dice.random() < 0.7:
        value[key] = mutated_value(value[key], dice)
        return value
    kind = dice.randrange(5)
    if kind == 0:
        del value[key]
    elif kind == 1 and isinstance(value, dict):
        value[str(dice.choice(ODD))[:20]] = value.pop(key)
    elif kind == 2 and isinstance(value, list):
        value.append(value[key])
    elif kind == 3:
        value[key] = value[dice.choice(keys)]
    else:
        value[key] = dice.choice(ODD)
    return value


def mutated_json(raw: bytes, dice: random.Random) -> bytes:
    if dice.random() < 0.3:
        return mutated_bytes(raw, dice)
    value = mutated_value(json.loads(raw), dice)
    return json.dumps(value, ensure_ascii=dice.random() < 0.9).encode("utf-8", "surrogatepass")


def mutated_lines(raw: bytes, dice: random.Random) -> bytes:
    """One of several lines of JSON."""
    lines = raw.splitlines(keepends=True)
    at = dice.randrange(len(lines))
    lines[at] = mutated_json(lines[at], dice) + b"\n"
    return b"".join(lines)


def mutated_csv(raw: bytes, dice: random.Random) -> bytes:
    if dice.random() < 0.6:
        return mutated_bytes(raw, dice)
    table = list(csv.reader(io.StringIO(raw.decode())))
    row = dice.choice(table)
    row[dice.randrange(len(row))] = str(dice.choice(ODD))
    if dice.random() < 0.3:
        row.append("more")
    text = io.StringIO()
    csv.writer(text, delimiter=dice.choice(",;\t|")).writerows(table)
    return text.getvalue().encode("utf-8", "surrogatepass")


def mutated_parquet(raw: bytes, dice: random.Random) -> bytes:
    """Bytes, or a table with a column of another type."""
    if dice.random() < 0.7:
        return mutated_bytes(raw, dice)
    columns = [
        pyarrow.array([2**62, None, 0], pyarrow.timestamp(dice.choice(("us", "ns")))),
        pyarrow.array([2**62, None, 0], pyarrow.duration(dice.choice(("s", "us", "ns")))),
        pyarrow.array([b"\xff\xfe", None, b""], pyarrow.binary()),
        pyarrow.array([[{"role": "user", "content": "你"}], None, []]),
        pyarrow.array(["一", None, "二"]).dictionary_encode(),
        pyarrow.array([1.5, None, float("nan")]),
        pyarrow.array([None, None, None], pyarrow.null()),
        pyarrow.array([[("a", 1)], None, []], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
    ]
    names = dice.sample(["text", "messages", "prompt", "chosen", "a"], 2)
    table = pyarrow.table(dice.sample(columns, 2), names)
    out = io.BytesIO()
    pyarrow.parquet.write_table(table, out)
    return out.getvalue()


def mutated_header(raw: bytes, dice: random.Random) -> bytes:
    """The header of a safetensors file: its length, its JSON, or its bytes."""
    length = int.from_bytes(raw[:8], "little")
    header, data = raw[8 : 8 + length], raw[8 + length :]
    if dice.random() < 0.2:
        return mutated_bytes(raw[: 8 + length], dice) + data
    new = mutated_json(header, dice)
    if dice.random() < 0.5:
        return len(new).to_bytes(8, "little") + new + data
    return new[: 8 + length].rjust(8 + length) + data


def mutated_state(raw: bytes, dice: random.Random) -> bytes:
    """Bytes, or something else that torch.load reads."""
    if dice.random() < 0.5:
        return mutated_bytes(raw, dice)
    state = torch.load(io.BytesIO(raw), weights_only=True)
    out = io.BytesIO()
    torch.save(mutated_value(state, dice), out)
    return out.getvalue()


# ---- the commands that read them


@pytest.fixture(scope="module")
def files(tok, tmp_path_factory):
    """A model, a run of one step, shards, and rows."""
    folder = tmp_path_factory.mktemp("files")
    model = tiny_model(vocab_size=448)
    model.set_vocabulary(len(tok))
    checkpoint.save(folder / "model", model, tok)
    weights = folder / "model" / checkpoint.WEIGHTS
    split = folder / "split"
    checkpoint.save(split, model, tok)
    (split / checkpoint.WEIGHTS).rename(split / "part.safetensors")
    index = {"weight_map": dict.fromkeys(model.state_dict(), "part.safetensors")}
    (split / checkpoint.WEIGHTS_INDEX).write_text(json.dumps(index))
    assert weights.exists()

    rows = write(folder / "rows.jsonl", [{"text": text} for text in TEXTS] + SFT)
    call(clean, f"--input {rows} --out {folder}/rows.parquet")
    plain = write(folder / "plain.jsonl", [{"text": text, "n": "1"} for text in TEXTS])
    call(clean, f"--input {plain} --out {folder}/rows.csv")
    from nanophi.text import shards

    call(shards, f"--input {plain} --tokenizer {folder}/model --out {folder}/tokens")
    write(folder / "sft.jsonl", SFT)
    call(sft, RESUME.format(folder=folder).replace("--resume", ""))
    return folder


RESUME = (
    "--init-from {folder}/model --data {folder}/sft.jsonl --out {folder}/run --steps 1 --warmup 0 "
    "--batch-tokens 64 --device cpu --resume"
)
GENERATE = "--max-new-tokens 2 --device cpu --prompt 你 --model {folder}/"
PRETRAIN = "--show-batch --out {folder}/new --tokenizer {folder}/model --preset demo --context 32"
READERS = {
    "config.json": ("model/config.json", mutated_json, generate, GENERATE + "model"),
    "index": (f"split/{checkpoint.WEIGHTS_INDEX}", mutated_json, generate, GENERATE + "split"),
    "tokenizer.json": ("model/tokenizer.json", mutated_json, generate, GENERATE + "model"),
    "safetensors": ("model/model.safetensors", mutated_header, generate, GENERATE + "model"),
    "train_state.pt": ("run/train_state.pt", mutated_state, sft, RESUME),
    "shard": (
        "tokens/train-00000.bin",
        mutated_bytes,
        pretrain,
        PRETRAIN + " --data {folder}/tokens",
    ),
    "metrics.jsonl": (
        "run/metrics.jsonl",
        mutated_lines,
        plot,
        "{folder}/run --out {folder}/new.png --reference {folder}/new.json",
    ),
    "jsonl": (
        "rows.jsonl",
        mutated_lines,
        clean,
        "--input {folder}/rows.jsonl --out {folder}/new.jsonl",
    ),
    "csv": ("rows.csv", mutated_csv, clean, "--input {folder}/rows.csv --out {folder}/new.jsonl"),
    "parquet": (
        "rows.parquet",
        mutated_parquet,
        clean,
        "--input {folder}/rows.parquet --out {folder}/new.parquet",
    ),
}


def call(script, flags: str) -> None:
    run_command(script.Config, script.main, flags.split())


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """What is there, and whether it has been touched."""
    found = {}
    for path in folder.rglob("*"):
        at = path.stat()
        found[str(path)] = (at.st_size, at.st_mtime_ns) if path.is_file() else (0, 0)
    return found


@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", READERS)
def test_a_mutated_file_gives_a_result_or_one_line(name, count, files, capsys, monkeypatch):
    # What does not depend on files is done once and not ten thousand times.
    monkeypatch.setattr(preflight, "matrix_flops", lambda device, dtype: 1e11)
    monkeypatch.setattr(checkpoint, "check_architecture", lambda model: None)
    path, mutate, script, flags = READERS[name]
    whole = (files / path).read_bytes()
    flags = flags.format(folder=files)
    seeds = range(count)
    if os.environ.get("FUZZ"):
        only, seed = os.environ["FUZZ"].split()
        seeds = [int(seed)] if only == name else []
    refused = 0
    try:
        for seed in seeds:
            refused += one_mutation(name, seed, files, files / path, whole, mutate, script, flags)
            capsys.readouterr()
    finally:
        (files / path).write_bytes(whole)
    assert os.environ.get("FUZZ") or name in SKIPPING or refused > 0


def one_mutation(name, seed, folder, path, whole, mutate, script, flags) -> bool:
    """Mutate, call, compare; whether the command refused it."""
    place = f'FUZZ="{name} {seed}"'
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.load warns about mutated files
        path.write_bytes(mutate(whole, random.Random(f"{name} {seed}")))
    for file in folder.glob("new*"):
        file.unlink()
    before = tree(folder)
    errors = io.StringIO()
    began = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stderr", errors)
        try:
            call(script, flags)
            code = 0
        except SystemExit as exit:
            code = exit.code
        except BaseException as error:
            raise AssertionError(f"{place}: {error!r}") from error
    assert time.monotonic() - began < LONGEST_S, place
    lines = [line for line in errors.getvalue().splitlines() if line.startswith("error: ")]
    assert (code, len(lines)) in ((0, 0), (2, 1)), (place, code, errors.getvalue())
    if code == 2 or name not in RESUMED:
        after = {file: at for file, at in tree(folder).items() if "new" not in Path(file).name}
        assert after == before, place
    if code == 2:
        assert not list(folder.glob("new*")), place
    return code == 2


SKIPPING = ("jsonl",)  # `clean` goes on without the rows that it cannot read
RESUMED = ("train_state.pt",)  # a run that goes on writes its files again
