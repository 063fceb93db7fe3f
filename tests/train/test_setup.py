"""What a run refuses before it loads, reads or waits: settings, absurd sizes, the environment."""

import dataclasses
import io
import json
import re
import sys

import pytest
import torch

import dpo
import pretrain
import sft
from nanophi.cli import UserError, parser_for, run_command
from nanophi.model.config import PhiConfig
from nanophi.model.phi import Phi
from nanophi.text.share import in_share
from nanophi.train import config as settings
from nanophi.train import distributed, preflight, setup
from nanophi.train.config import BadRows, TrainConfig, total_steps
from nanophi.train.distributed import launch
from nanophi.train.packing import Batch
from nanophi.train.preflight import fit, size_of
from nanophi.train.setup import begin, contradictions
from tests.conftest import ANSWER, QUESTION, SFT, tiny_model, write
from tests.train.test_loop import config

VARIABLES = (
    "WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "GROUP_WORLD_SIZE",
    "TORCHELASTIC_RESTART_COUNT",
)  # fmt: skip


# ---- settings


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", "10"), ("steps", 0), ("steps", True), ("steps", 2**62), ("lr", -1), ("lr", "1"),
        ("lr", float("nan")), ("lr", 1e300), ("micro_batch", 0), ("micro_batch", 2.5),
        ("optimizer", "adam"), ("dtype", "int8"), ("seed", -1), ("seed", 2**63), ("bos", "no"),
        ("dropout", 1.5), ("warmup", None), ("out", 5), ("schedule", ["wsd"]),
    ],
)  # fmt: skip
def test_settings_made_in_python_are_checked_like_flags(field, value, tmp_path):
    """TrainConfig(steps="10", lr=-1, micro_batch=0) trained, or failed far from its cause."""
    with pytest.raises(UserError, match=f"^{field} is .*, expected |^no {field} is called "):
        begin(dataclasses.replace(config(tmp_path / "out"), **{field: value}))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("cfg", [None, {"steps": 1}, "out"])
def test_what_are_no_settings_is_one_line(cfg):
    with pytest.raises(UserError, match=r"the settings are .*, expected a TrainConfig"):
        begin(cfg)


def test_dpo_looks_at_its_loss_after_its_kind(tmp_path):
    """The name was looked up before anybody asked whether it is one: a list cannot be."""
    cfg = dpo.Config(init_from="x", data=["x"], out=str(tmp_path / "out"), loss=["sigmoid"])
    with pytest.raises(UserError, match=r"^loss is .*, expected one of sigmoid"):
        dpo.main(cfg)


def test_empty_names_are_refused(tmp_path):
    """An empty --sample was ignored; an empty --out wrote the run into the working directory."""
    cfg = pretrain.Config(out=" ", data="", tokenizer="x", sample="", device="cpu")
    empty = {f"--{name} is empty" for name in ("out", "data", "sample")}
    assert set(contradictions(cfg, "cpu")) == empty
    with pytest.raises(UserError, match="--sample is empty"):
        begin(dataclasses.replace(cfg, out=str(tmp_path), data="x"))


# ---- absurd sizes

COMMON = {
    "context": 10**9, "micro-batch": 10**12, "steps": 2**62, "epochs": 1e300, "seed": 2**63,
    "warmup": 2**62, "save-minutes": 1e300, "lr": 1e300, "weight-decay": 1e300,
}  # fmt: skip
OF_A_SCRIPT = {
    pretrain: {
        "layers": 10**7,
        "width": 6e12,
        "heads": 10**12,
        "mlp": 10**12,
        "batch-tokens": 1e15,
    },
    sft: {"batch-tokens": 10**15},
    dpo: {"batch-pairs": 10**12, "beta": 1e300},
}


@pytest.mark.parametrize("script", OF_A_SCRIPT, ids=lambda script: script.__name__)
def test_absurd_sizes_are_refused_by_the_parser(script, capsys):
    """--context 1000000000 made a list of as many rows, and --layers 10000000 as many layers,
    before anybody asked whether they fit.
    """
    for name, value in (COMMON | OF_A_SCRIPT[script]).items():
        text = str(int(value)) if value < 1e30 and name != "epochs" else str(value)
        with pytest.raises(SystemExit):
            parser_for(script.Config, "").parse_args([f"--{name}", text])
        said = capsys.readouterr().err
        problem = "is out of range|is no number that can be used"
        assert re.search(f"argument --{name}: {re.escape(text[:40])} ({problem})", said)


def test_the_largest_that_the_flags_take_is_refused_for_its_memory(monkeypatch):
    monkeypatch.setattr(preflight, "available_bytes", lambda device: 8e9)
    shape = PhiConfig(
        hidden_size=2**20,
        num_attention_heads=2**10,
        intermediate_size=2**24,
        num_hidden_layers=10_000,
        max_position_embeddings=settings.LONGEST_CONTEXT,
    )
    ready = setup.Setup(config("x", micro_batch=settings.MOST_SAMPLES), ALONE, "float32")
    with pytest.raises(UserError, match=r"GB, 8\.0 GB are free on cpu: take a smaller --preset"):
        fit(shape, ready, settings.MOST_SAMPLES, settings.LONGEST_CONTEXT)


ALONE = distributed.World(0, 1, "cpu")


def test_one_layer_stands_for_all():
    """All layers were built, one by one, although they have the same size."""
    model = tiny_model(num_hidden_layers=3)
    size = size_of(model.cfg)
    assert size.parameters == model.num_parameters()
    many = size_of(dataclasses.replace(model.cfg, num_hidden_layers=10_000))
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    assert many.parameters == size.parameters + (10_000 - 3) * layer


def test_weights_that_are_loaded_are_not_counted_twice(monkeypatch):
    """sft.py and dpo.py begin with a model in memory, so what is free is what it has left."""
    model = tiny_model()
    ready = setup.Setup(config("x", micro_batch=8), ALONE, "float32")
    needed = preflight.training_bytes(model.cfg, "muon", 8, 64, False, False)
    weights = 4 * model.num_parameters()
    monkeypatch.setattr(preflight, "available_bytes", lambda device: needed - weights)
    fit(model.cfg, ready, 100, 64, model=model)
    with pytest.raises(UserError, match="training this model takes about"):
        fit(model.cfg, ready, 100, 64)
    with pytest.raises(UserError, match="training this model takes about"):
        fit(model.cfg, ready, 100, 64, rows_per_sample=2, model=model)


def test_epochs_of_too_many_steps_are_refused():
    cfg = TrainConfig(out="x", epochs=1e8)
    with pytest.raises(
        UserError, match=r"--epochs 1e\+08 are 1\.0e\+10 steps, more than 1,000,000"
    ):
        total_steps(cfg, 100)


@pytest.mark.parametrize("script", [sft, dpo], ids=lambda script: script.__name__)
def test_tuning_asks_for_memory_too(script, house, tmp_path, monkeypatch):
    """Only pretrain.py asked; the others were killed by the system in the middle of their work."""
    monkeypatch.setattr(preflight, "available_bytes", lambda device: 1000)
    name, source = ("sft.jsonl", "pretrain") if script is sft else ("dpo.jsonl", "sft")
    cfg = script.Config(
        init_from=str(house / source), data=[str(house / name)], out=str(tmp_path / "x"),
        device="cpu", **({"batch_pairs": 3} if script is dpo else {"batch_tokens": 128}),
    )  # fmt: skip
    with pytest.raises(UserError, match="training this model takes about"):
        script.main(cfg)
    assert not (tmp_path / "x" / "model.safetensors").exists()


# ---- the environment


@pytest.fixture
def variables(monkeypatch):
    """Sets exactly these variables of torchrun's."""

    def put(**values):
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    put()
    return put


RANKS = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("value", ["x", "", "0", "-1", "1.5", " 2", "1e3", "２", "9" * 30])
def test_a_strange_world_size_is_one_line(value, variables, tmp_path):
    """WORLD_SIZE=x was a traceback in every training script."""
    variables(WORLD_SIZE=value)
    with pytest.raises(UserError, match=r"WORLD_SIZE is .*, expected a whole number of at least 1"):
        begin(config(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RANK", None), ("RANK", "2"), ("RANK", "-1"), ("RANK", "x"), ("RANK", ""),
        ("MASTER_ADDR", None), ("MASTER_ADDR", ""), ("MASTER_ADDR", "a b"),
        ("MASTER_PORT", None), ("MASTER_PORT", "x"),
        ("MASTER_PORT", "0"), ("MASTER_PORT", "70000"), ("LOCAL_RANK", "x"), ("LOCAL_RANK", "-1"),
        ("GROUP_WORLD_SIZE", "0"), ("GROUP_WORLD_SIZE", ""), ("TORCHELASTIC_RESTART_COUNT", "x"),
        ("TORCHELASTIC_RESTART_COUNT", "-1"),
    ],
)  # fmt: skip
def test_ranks_with_a_strange_environment_are_one_line(name, value, variables, tmp_path):
    """Some were tracebacks; a RANK of 2 among 2 ranks waited for ten minutes."""
    given = RANKS | {name: value}
    variables(**{key: text for key, text in given.items() if text is not None})
    with pytest.raises(UserError, match=f"{name}.*torchrun, or unset WORLD_SIZE"):
        begin(config(tmp_path / "out"))


@pytest.mark.parametrize(
    "values",
    [{}, {"RANK": "3"}, {"RANK": "x", "MASTER_PORT": "x"}, {"WORLD_SIZE": "1", "RANK": "7"}],
)
def test_what_a_cluster_sets_for_itself_does_not_count(values, variables):
    variables(**values)
    assert launch().size == 1
    assert distributed.join("cpu") == ALONE


def test_what_torchrun_says_is_read(variables):
    variables(**RANKS, LOCAL_RANK="1", GROUP_WORLD_SIZE="1", TORCHELASTIC_RESTART_COUNT="3")
    assert launch() == distributed.Launch(size=2, rank=1, local_rank=1, machines=1, attempt=3)


def test_attention_by_documents_is_refused_on_a_gpu(tmp_path):
    """It waits for the GPU in each layer, and splits the graph of a compiled model."""
    cfg = config(tmp_path, attention="documents", dtype="bfloat16")
    assert contradictions(cfg, "cuda")[0].startswith("--attention documents waits for the GPU")
    assert contradictions(cfg, "cpu") == []


# ---- rows


BAD_ROWS = [
    SFT[0],
    {"messages": [{"role": "user", "content": "你"}, {"role": "user", "content": "好"}]},
    {"instruction": "没有回答"},
    *[{"messages": [{"role": "assistant", "content": ANSWER}]}] * 5,
]


def tuned(script, house, out, rows, **more):
    size = {"batch_pairs": 1} if script is dpo else {"batch_tokens": 128}
    cfg = script.Config(
        init_from=str(house / "sft"), data=[write(out / "rows.jsonl", rows)], out=str(out / "x"),
        device="cpu", steps=1, warmup=0, **size | more,
    )  # fmt: skip
    return script.main(cfg)


def test_all_bad_rows_are_told_at_once_or_skipped(house, tmp_path, capsys):
    """One conversation of 100,000 had two questions in a row: sft.py stopped at it, and after each
    repair at the next one.
    """
    with pytest.raises(UserError) as refused:
        tuned(sft, house, tmp_path, BAD_ROWS)
    message = str(refused.value)
    assert message.startswith("7 rows cannot be used: ")
    assert [f"line {number}:" in message for number in range(1, 9)] == [
        False, *[True] * 5, False, False
    ]  # fmt: skip
    assert "message 2 is from 'user'; user and assistant take turns" in message
    assert "; and 2 more. Mend them, or give --skip-bad" in message
    tuned(sft, house, tmp_path, BAD_ROWS, skip_bad=True)
    said = capsys.readouterr().out
    assert said.count("skipped: ") == 6
    assert "sft: 1 conversations" in said


def test_bad_pairs_are_told_at_once_or_skipped(house, tmp_path, capsys):
    good = {"prompt": QUESTION, "chosen": ANSWER, "rejected": "不知道。"}
    rows = [good, {"prompt": QUESTION, "chosen": 5, "rejected": "x"}, {"prompt": QUESTION}]
    with pytest.raises(UserError, match=r"2 rows cannot be used: .*line 2: .*; .*line 3: "):
        tuned(dpo, house, tmp_path, rows)
    tuned(dpo, house, tmp_path, rows, skip_bad=True)
    assert "dpo: 1 pairs" in capsys.readouterr().out


def test_a_fault_of_the_tokenizer_is_no_bad_row(house, tmp_path, monkeypatch):
    """With --skip-bad, a tokenizer that cannot encode anything would make all rows bad."""

    def broken(*args):
        raise UserError("no special token is called [EOS]")

    monkeypatch.setattr(sft, "encode_chat", broken)
    with pytest.raises(UserError, match=r"^no special token is called \[EOS\]$"):
        tuned(sft, house, tmp_path, SFT, skip_bad=True)


def test_nothing_bad_is_nothing_said(capsys):
    BadRows().settle(skip=False)
    BadRows().settle(skip=True)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("rows", [[], [{"text": "没有对话"}]], ids=["empty", "useless"])
def test_validation_without_a_usable_row_is_one_line(rows, house, tmp_path):
    path = write(tmp_path / "val.jsonl", rows)
    with pytest.raises(UserError, match=r"val\.jsonl"):
        tuned(sft, house, tmp_path, SFT, val_data=path, skip_bad=True)


def test_pairs_that_are_all_too_long_or_held_out_are_one_line(house, tmp_path, capsys):
    """It said only that there is no pair, although the file held some."""
    pairs = [{"prompt": QUESTION, "chosen": ANSWER, "rejected": "不知道。"}] * 2
    with pytest.raises(UserError, match="train on: 2 whose question alone fills 8 tokens dropped"):
        tuned(dpo, house, tmp_path, pairs, context=8)
    held = [pair | {"prompt": text} for pair in pairs for text in ("春", "秋")]
    held = [pair for pair in held if in_share(pair["prompt"], 0.9)]
    with pytest.raises(UserError, match=rf"{len(held)} held out \(--val-fraction\)"):
        tuned(dpo, house, tmp_path, held, val_fraction=0.9)
    tuned(dpo, house, tmp_path, pairs, val_fraction=1e-9)
    assert "note: --val-fraction 1e-09 holds out none of 2 pairs" in capsys.readouterr().out


# ---- streams


def test_a_terminal_without_the_signs_of_the_batch(house, tmp_path, monkeypatch):
    """GBK, the Chinese console of Windows, has neither ⟦ nor ⏎: training died at its first sample,
    with all steps before it lost.
    """
    for flags, sign in ((["--show-batch"], "\\u27e6"), (["--sample", "问\n"], "\\u23ce")):
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="gbk"))
        common = [
            "--init-from", str(house / "pretrain"), "--data", str(house / "sft.jsonl"),
            "--out", str(tmp_path / flags[0]), "--batch-tokens", "128", "--steps", "1",
            "--device", "cpu", "--warmup", "0",
        ]  # fmt: skip
        run_command(sft.Config, sft.main, common + flags)
        sys.stdout.flush()
        assert sign in written.getvalue().decode("gbk")
    lines = (tmp_path / "--sample" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert isinstance(json.loads(lines[-1])["sample"], str)


# ---- what a GPU gets where nothing is said

GPU = distributed.World(0, 1, "cuda")
SMALL = PhiConfig.preset("phi2-chinese-0.2b")


def begun_on(world, tmp_path, monkeypatch, **flags):
    """The setup of a run on devices that are not there."""
    monkeypatch.setattr(setup, "pick_device", lambda name: world.device)
    monkeypatch.setattr(setup, "join", lambda device: world)
    monkeypatch.setattr(setup.precision, "compute_dtype", lambda dtype, device: "bfloat16")
    return setup.begin(TrainConfig(out=str(tmp_path / "out"), **flags))


def test_a_gpu_compiles_and_finds_its_micro_batch_and_a_cpu_does_neither(tmp_path, monkeypatch):
    """The defaults were those of a CPU: 8 rows, eager, 16,384 tokens a step. An H100 would have
    waited nine tenths of the time.
    """
    ready = begun_on(GPU, tmp_path, monkeypatch)
    assert (ready.cfg.compile, ready.cfg.micro_batch) == (True, None)
    ready = begun_on(GPU, tmp_path, monkeypatch, compile=False, micro_batch=4)
    assert (ready.cfg.compile, ready.micro_batch) == (False, 4)
    ready = begun_on(ALONE, tmp_path, monkeypatch)
    assert (ready.cfg.compile, ready.micro_batch) == (False, 8)


@pytest.mark.parametrize(
    ("free_gb", "samples", "expected"),
    [
        (80, 256, 128),  # ENOUGH_TOKENS: 128 rows of 512
        (80, 100, 100),  # a step has no more
        (80, 130, 65),  # two of one size, not 128 and 2
        (8, 256, 8),  # what fits
    ],
)
def test_the_micro_batch_fills_a_gpu(free_gb, samples, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "available_bytes", lambda device: free_gb * 1e9)
    ready = begun_on(GPU, tmp_path, monkeypatch)
    micro_batch = fit(SMALL, ready, samples, 512).micro_batch
    assert micro_batch == expected
    needed = preflight.training_bytes(SMALL, "muon", micro_batch, 512, True, False, device="cuda")
    assert needed < preflight.FILLED * free_gb * 1e9


class Crowded(distributed.World):
    """Another rank has less memory."""

    def gather(self, value):
        return [value, 5]


def test_all_ranks_have_one_micro_batch(tmp_path, monkeypatch):
    """Ranks that share a model must run the same number of micro-batches, or wait for ever."""
    monkeypatch.setattr(preflight, "available_bytes", lambda device: 80e9)
    ready = begun_on(Crowded(0, 2, "cuda"), tmp_path, monkeypatch)
    assert fit(SMALL, ready, 64, 512).micro_batch == 5


def test_a_model_too_large_for_a_gpu_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "available_bytes", lambda device: 2e9)
    ready = begun_on(GPU, tmp_path, monkeypatch)
    with pytest.raises(UserError, match=r"takes about .* GB, 2\.0 GB are free on cuda"):
        fit(SMALL, ready, 256, 512)


def test_the_tokens_of_a_step_follow_the_model_and_the_gpus():
    tiny = PhiConfig.preset("demo")
    eight = dataclasses.replace(GPU, size=8)
    found = [preflight.tokens_of_a_step(shape, w) for shape in (tiny, SMALL) for w in (GPU, eight)]
    assert found == [16_384, 16_384, 131_072, 262_144]
    assert preflight.tokens_of_a_step(SMALL, ALONE) == 16_384


@pytest.mark.parametrize(("rows", "world", "warns"), [(256, GPU, False), (32, GPU, True),
    (256, dataclasses.replace(GPU, size=8), True), (32, ALONE, False)])  # fmt: skip
def test_ranks_with_too_little_to_do_are_warned_of(rows, world, warns):
    with torch.device("meta"):
        model = Phi(SMALL)
    ids = torch.zeros(rows, 512, dtype=torch.int64)
    batch = Batch(ids, ids, torch.arange(0, ids.numel() + 1, 512, dtype=torch.int32))
    note = preflight.note_on_few_tokens(model, batch, world)
    assert (note is not None) == warns
    if note is not None:
        assert f"each GPU computes {16_384:,} tokens a step" in note
