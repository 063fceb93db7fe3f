"""Pictures of runs, and the answer to "is my loss right?"."""

import json

import pytest

from nanophi.cli import UserError
from nanophi.train.plot import Config, compare, main, make_reference, smooth


def a_run(path, losses, seed=0):
    path.mkdir()
    lines = [{"step": i + 1, "loss": loss, "val_loss": loss} for i, loss in enumerate(losses)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = {"config": {"seed": seed, "lr": 1e-3, "out": str(path)}, "versions": {"torch": "x"}}
    (path / "run.json").write_text(json.dumps(record))
    return str(path)


def curve(start, slope=0.02, steps=100):
    return [start - slope * i for i in range(steps)]


def test_smooth():
    assert smooth([1, 2, 3, 4], 2) == [1, 1.5, 2.5, 3.5]


def test_a_run_is_compared_with_a_band(tmp_path, capsys):
    runs = [a_run(tmp_path / f"seed{seed}", curve(6 + 0.1 * seed), seed) for seed in range(3)]
    band = tmp_path / "reference" / "band.json"
    main(Config(runs=runs, out=str(tmp_path / "x.png"), reference=str(band)))
    reference = json.loads(band.read_text())
    assert reference["seeds"] == [0, 1, 2]
    assert reference["config"] == {"lr": 1e-3}
    assert reference == make_reference(runs)
    assert (tmp_path / "x.png").stat().st_size > 5000
    good = a_run(tmp_path / "good", curve(6.1))
    high = a_run(tmp_path / "high", curve(6.1, slope=0.015))
    broken = a_run(tmp_path / "broken", [None, *curve(6.1)[1:]])
    main(Config(runs=[good, high, broken], out=str(tmp_path / "y.png"), compare=str(band)))
    printed = capsys.readouterr().out
    assert f"{good}: inside the band (at step 100 " in printed
    assert f"{broken}: inside the band" in printed
    assert f"{high}: OUTSIDE the band in " in printed
    assert "first above it at " in printed


def test_what_cannot_be_compared_is_said(tmp_path):
    run = a_run(tmp_path / "run", curve(6))
    (tmp_path / "band.json").write_text("[]")
    for path in ("missing.json", "band.json"):
        with pytest.raises(UserError, match="is no reference"):
            main(Config(runs=[run], out=str(tmp_path / "x.png"), compare=str(tmp_path / path)))
    with pytest.raises(UserError, match="no step in common"):
        compare(run, {"steps": [1000], "low": [1], "high": [2]})
    with pytest.raises(UserError, match="is no run"):
        main(Config(runs=[str(tmp_path)], out=str(tmp_path / "x.png")))


DAMAGED = {
    "a number": b"5",
    "a list": b"[]",
    "no loss": b'{"step": 1}',
    "a loss of letters": b'{"step": 1, "loss": "x"}',
    "no text": b"\xff",
    "very deep": b"[" * 100_000,
}


@pytest.mark.parametrize("line", DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_lines_are_left_out_and_counted(tmp_path, line, capsys):
    """Each ended in a traceback."""
    run = a_run(tmp_path / "run", curve(6))
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_bytes(line + b"\n" + metrics.read_bytes())
    main(Config(runs=[run], out=str(tmp_path / "x.png")))
    assert "1 lines of" in capsys.readouterr().out
    metrics.write_bytes(line + b"\n")
    with pytest.raises(UserError, match="has no line with a step and a finite loss"):
        main(Config(runs=[run], out=str(tmp_path / "x.png")))


@pytest.mark.parametrize("record", ["{", "[]", '{"config": 5}', '{"config": {}, "versions": {}}'])
def test_a_reference_needs_whole_records(tmp_path, record):
    run = a_run(tmp_path / "run", curve(6))
    (tmp_path / "run" / "run.json").write_text(record)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"run\.json"):
        main(Config(runs=[run], out=str(tmp_path / "x.png"), reference=str(tmp_path / "r.json")))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("out", ["", "/", "{run}/metrics.jsonl", "{run}/run.json", "{run}/x.doc"])
def test_pictures_overwrite_nothing(tmp_path, out):
    run = a_run(tmp_path / "run", curve(6))
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="--out"):
        main(Config(runs=[run], out=out.format(run=run)))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
