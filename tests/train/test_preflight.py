"""What a run says before it begins is true, and refuses what cannot work before it takes the
memory.
"""

import json

import numpy as np
import pytest
import torch

from nanophi.cli import UserError
from nanophi.model.attention import manual
from nanophi.model.config import PhiConfig
from nanophi.train import preflight
from nanophi.train.loop import train
from nanophi.train.losses import next_token_loss
from nanophi.train.packing import Packed
from nanophi.train.preflight import (
    check_memory,
    flops_per_token,
    matrix_parameters,
    show_batch,
    training_bytes,
)
from nanophi.train.setup import begin, contradictions
from tests.conftest import tiny_model
from tests.train.test_loop import config, pretraining


def test_matrix_parameters_and_flops():
    """Counted from the module itself: everything with two dimensions but the embedding."""
    model = tiny_model()
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    assert matrix_parameters(model.cfg) == sum(p.numel() for p in matrices)
    cfg = PhiConfig.preset("phi2-chinese-0.2b")
    attention = 12 * cfg.num_hidden_layers * cfg.hidden_size * 512
    assert flops_per_token(cfg, 512) == 6 * matrix_parameters(cfg) + attention


def test_memory_is_estimated_and_too_much_refused_with_what_would_fit(monkeypatch):
    cfg = PhiConfig.preset("phi2-chinese-0.35b")
    monkeypatch.setattr(preflight, "available_bytes", lambda device: 8_000_000_000)
    few, many = (training_bytes(cfg, "muon", rows, 512, False, False) for rows in (1, 8))
    assert 4.2e9 < few < many
    assert training_bytes(cfg, "adamw", 1, 512, False, False) > few
    half, again = (
        training_bytes(cfg, "muon", 8, 512, True, recompute) for recompute in (False, True)
    )
    assert many > half > again
    on_a_gpu = training_bytes(cfg, "muon", 8, 512, True, False, device="cuda:0")
    assert on_a_gpu - half == (4096 - 512) * 12 * 32768  # the logits of all tokens
    few_tokens = training_bytes(PhiConfig.preset("phi-2"), "muon", 1, 8, False, False)
    assert few_tokens == pytest.approx(
        2779.7e6 * 12.6 + 36 * 2**25, rel=1e-3
    )  # what Muon iterates with
    assert check_memory(cfg, "muon", 1, 512, False, False, "cpu") == few
    with pytest.raises(
        UserError, match=r"takes about \d+\.\d GB, 8\.0 GB are free on cpu: try --micro-batch 1 \("
    ):
        check_memory(cfg, "muon", 64, 512, False, False, "cpu")
    monkeypatch.setattr(preflight, "available_bytes", lambda device: 1_000_000_000)
    with pytest.raises(UserError, match="take a smaller --preset, or --layers and --width"):
        check_memory(cfg, "muon", 1, 512, False, False, "cpu")
    monkeypatch.setattr(preflight, "available_bytes", lambda device: None)
    assert check_memory(cfg, "muon", 64, 512, False, False, "cpu") > 8e9


@pytest.mark.parametrize(("dtype", "half"), [(torch.float32, False), (torch.bfloat16, True)])
def test_readable_attention_is_estimated_by_what_it_keeps(dtype, half):
    """It kept a half more than was estimated: in half precision the weights are there twice."""
    heads, time = 3, 40
    q, k, v = (torch.randn(1, heads, time, 8, dtype=dtype, requires_grad=True) for _ in range(3))
    kept = {}

    def keep(x):
        if x.numel() == heads * time * time:
            kept[x.data_ptr()] = x.nbytes
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = manual(q, k, v, torch.ones(time, time, dtype=torch.bool).tril())
    assert out.requires_grad
    cfg = PhiConfig.preset("demo", num_attention_heads=heads, hidden_size=48, num_hidden_layers=1)
    estimates = [
        training_bytes(cfg, "muon", 1, time, half, False, attention=name)
        for name in ("manual", "sdpa")
    ]
    assert estimates[0] - estimates[1] == sum(kept.values())


def test_a_rank_holds_its_part_of_a_sharded_model_and_the_head():
    cfg = PhiConfig.preset("phi2-chinese-0.35b")
    alone, of_two, of_many = (
        training_bytes(cfg, "adamw", 1, 512, False, False, shards) for shards in (1, 2, 1000)
    )
    assert alone > of_two > of_many > 2 * cfg.vocab_size * cfg.hidden_size * 8


def test_contradictions_are_told_all_at_once(tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    wrong = {
        "epochs": 2.0,
        "shard": True,
        "attention": "varlen",
        "resume": "yes",
        "overwrite": True,
        "dropout": 0.1,
    }
    with pytest.raises(UserError) as raised:
        begin(config(tmp_path, **wrong))
    assert str(raised.value) == (
        "give --steps or --epochs, not both; --resume goes on with what --overwrite would delete; "
        "--shard splits the model over ranks: start them with torchrun --nproc-per-node N; "
        "--attention varlen needs a GPU, and this is cpu; --attention varlen has no dropout"
    )
    assert contradictions(config(tmp_path), "cpu") == []


def test_the_batch_is_shown_with_borders_and_mask(tok):
    documents = [
        np.array([*tok.encode(text), tok.eos_id]) for text in ("今天天气很好。", "我们去公园。")
    ]
    data = Packed(documents, 64, 1, seed=0)
    shown = show_batch(data.batch_at(0), tok)
    bare = shown.replace("⟦", "").replace("⟧", "").split("\n\n")
    assert sorted(bare) == ["┃今天天气很好。[EOS]", "┃我们去公园。[EOS]"]
    assert all(part.startswith("┃") and part.endswith("[EOS]⟧") for part in shown.split("\n\n"))
    prompt, answer = tok.encode("##提问:\n你好\n##回答:\n"), [*tok.encode("很好。"), tok.eos_id]
    masks = [np.array([False] * len(prompt) + [True] * len(answer))]
    taught = Packed([np.array([*prompt, *answer])], 64, 1, 0, masks)
    assert show_batch(taught.batch_at(0), tok) == "┃##提问:\n你好\n##回答:\n⟦很好。[EOS]⟧"


def test_a_run_says_what_is_ahead(tmp_path, capsys):
    _, data = pretraining(None)
    train(tiny_model(), next_token_loss, data.batch_at, config(tmp_path, steps=2))
    said = capsys.readouterr().out
    assert "parameters: Muon " in said
    assert "AdamW " in said
    assert "ahead: 2 steps of 128 tokens on cpu, about 0s, peak memory about 0.0" in said
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert line["memory_gb"] > 0.05
    assert "mfu" not in line  # the peak of a CPU is not known


def test_showing_and_overfitting_leave_nothing(tmp_path, tok, capsys):
    _, data = pretraining(None)
    out = tmp_path / "out"
    train(tiny_model(), next_token_loss, data.batch_at, config(out, show_batch=True), tok=tok)
    train(
        tiny_model(), next_token_loss, data.batch_at, config(out, overfit_one_batch=True, lr=1e-2)
    )
    assert not out.exists()
    said = capsys.readouterr().out
    assert "┃" in said
    assert "after 100 steps: the model can learn" in said


def test_a_loss_that_teaches_nothing_fails_the_self_test(tmp_path):
    _, data = pretraining(None)

    def deaf(model, batch):
        loss, count, sums = next_token_loss(model, batch)
        return loss * 0 + count * 5.0, count, sums

    with pytest.raises(
        UserError, match=r"loss of one batch: 5\.000 at first, 5\.000 after 100 steps, not a tenth"
    ):
        train(tiny_model(), deaf, data.batch_at, config(tmp_path, overfit_one_batch=True))


def test_the_peak_is_known_by_the_devices_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert preflight.peak_flops("cuda:0") == 989e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some other card")
    assert preflight.peak_flops("cuda") is None
    assert preflight.peak_flops("cpu") is None


def test_a_split_model_holds_whole_gradients_between_micro_batches():
    """They are summed over the ranks once a step, and the estimate once forgot them."""
    cfg = PhiConfig.preset("phi-2")
    once, several = (
        preflight.training_bytes(
            cfg, "adamw", 4, 2048, True, True, shards=8, device="cuda", accumulates=accumulates
        )
        for accumulates in (False, True)
    )
    assert several - once == 4 * preflight.size_of(cfg).parameters
    alone = preflight.training_bytes(cfg, "adamw", 4, 2048, True, True, accumulates=True)
    assert alone == preflight.training_bytes(cfg, "adamw", 4, 2048, True, True)
