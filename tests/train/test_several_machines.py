"""docs/several-machines.md: what it says to type works."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import PREFERENCES, RAW, write

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "several-machines.md"
SMALL = (
    "--preset demo --width 32 --layers 2 --heads 2 --mlp 64 --steps 6 --batch-tokens 128 "
    "--micro-batch 1 --context 32 --warmup 1 --device cpu"
)


def block() -> str:
    """The commands of the section that anybody can try."""
    section = PAGE.read_text(encoding="utf-8").split("## Try it on one machine")[1]
    (found,) = re.findall(r"```bash\n(.*?)```", section.split("\n## ")[0], re.DOTALL)
    return found


def free_port() -> int:
    import socket

    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return listening.getsockname()[1]


def bash(script: str, cwd: Path) -> None:
    launcher = f"{sys.executable} -m torch.distributed.run"
    script = script.replace("torchrun", launcher)
    script = re.sub(r"(pretrain|dpo)\.py", rf"{ROOT}/\1.py", script)
    script = script.replace("29400", str(free_port()))
    ran = subprocess.run(
        ["bash", "-e", "-c", script], cwd=cwd, capture_output=True, text=True, timeout=600
    )
    assert ran.returncode == 0, ran.stderr[-9000:]


@pytest.mark.slow
def test_two_agents_train_as_one(tmp_path):
    import train_tokenizer
    from nanophi.text import shards

    raw = write(tmp_path / "raw.jsonl", [{"text": text} for text in RAW])
    tokenizer = str(tmp_path / "out" / "tokenizer")
    train_tokenizer.main(train_tokenizer.Config(input=[raw], out=tokenizer, vocab_size=400))
    shards.main(
        shards.Config(input=[raw], tokenizer=tokenizer, out=str(tmp_path / "out" / "tokens"))
    )
    two = block().replace("--out out/two", f"--out out/two {SMALL}")
    assert two.count(SMALL) == 2
    bash(two, tmp_path)
    one = two.splitlines()[1].replace("out/two", "out/one").replace("--nproc-per-node 1", "")
    one = one.replace("--nnodes 2", "--nnodes 1 --nproc-per-node 2")
    bash(one, tmp_path)
    weights = load_file(tmp_path / "out" / "one" / "model.safetensors")
    for name, found in load_file(tmp_path / "out" / "two" / "model.safetensors").items():
        assert torch.equal(found, weights[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["", "--shard"])
@pytest.mark.parametrize("script", ["pretrain", "dpo"])
def test_what_two_ranks_measure_is_what_one_process_does(house, tmp_path, script, flags):
    """Held-out documents and pairs are divided among the ranks, and all of them write the samples.
    Rank 0 alone measured, and the others waited.
    """
    pairs = [
        row | {"prompt": f"{number} {row['prompt']}"} for number in range(4) for row in PREFERENCES
    ]
    data = write(tmp_path / "dpo.jsonl", pairs)
    common = "--steps 4 --eval-every 2 --warmup 0 --micro-batch 1 --device cpu"
    given = {
        "pretrain": f"--data {house}/tokens --tokenizer {house}/tokenizer --preset demo --width 64 "
        "--layers 2 --heads 2 --mlp 128 --batch-tokens 64 --context 32 --sample 你好",
        "dpo": f"--init-from {house}/sft --data {data} --batch-pairs 2 "
        "--val-fraction 0.4 --context 64",
    }
    figures = []
    for ranks, more in ((1, ""), (2, flags)):
        out = tmp_path / str(ranks)
        launcher = sys.executable if ranks == 1 else "torchrun --standalone --nproc-per-node 2"
        bash(f"{launcher} {script}.py {given[script]} {common} {more} --out {out}", tmp_path)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        figures.append([line for line in lines if "val_loss" in line])
    assert [line["step"] for line in figures[0]] == [2, 4]
    for one, two in zip(*figures, strict=True):
        assert one.keys() - two.keys() <= {"val_kl"}  # which a sharded model does not measure
        measured = {name: value for name, value in two.items() if name.startswith("val_")}
        assert measured == pytest.approx({name: one[name] for name in measured}, abs=1e-5)
        assert one.get("sample") == two.get("sample")
