"""A checkpoint directory is read by transformers, and its directories are read here."""

import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, PhiForCausalLM
from transformers import PhiConfig as HFConfig

import nanophi
from nanophi.cli import UserError
from nanophi.model import attention, checkpoint
from nanophi.model.checkpoint import PROBE, PROBE_LOGITS, check_architecture
from tests.conftest import tiny_model

IDS = torch.arange(5, 45).view(2, 20)


def test_auto_model_reads_ours(tok, tmp_path):
    model = tiny_model()
    nanophi.save(tmp_path, model, tok)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(hf, PhiForCausalLM)
    assert (hf(IDS).logits - model(IDS)).abs().max() < 1e-5
    assert hf.config.n_inner == model.cfg.intermediate_size
    assert hf.generation_config.eos_token_id == 1
    again, again_tok = nanophi.load(tmp_path)
    assert torch.equal(again(IDS), model(IDS))
    assert again.cfg == model.cfg
    assert again_tok.fingerprint == tok.fingerprint


@pytest.mark.parametrize("shard_size", ["5GB", "60KB"])
def test_we_read_what_transformers_saves(tmp_path, shard_size):
    cfg = HFConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, rope_parameters={
            "rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.25
        },
    )  # fmt: skip
    hf = PhiForCausalLM(cfg).eval()
    hf.save_pretrained(tmp_path, max_shard_size=shard_size)
    model, tok = nanophi.load(tmp_path)
    assert tok is None
    assert model.cfg.rope_theta == 5000.0
    assert (hf(IDS).logits - model(IDS)).abs().max() < 1e-5


def test_legacy_rope_keys_are_read(tmp_path):
    """transformers 4 wrote rope_theta and partial_rotary_factor at the top level, and null for
    rope_scaling.
    """
    model = tiny_model(partial_rotary_factor=0.25)
    nanophi.save(tmp_path, model)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_scaling": None}))
    assert nanophi.load(tmp_path)[0].cfg == model.cfg


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings True"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": None},
            "rope_type 'linear'",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None},
            "rope_type 'linear'",
        ),
        ({"hidden_size": 64}, "does not fit its config.json"),
        ({"num_hidden_layers": 1}, "does not fit its config.json"),
    ],
)
def test_what_we_cannot_load_is_refused(tmp_path, changes, message):
    nanophi.save(tmp_path, tiny_model())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=message):
        nanophi.load(tmp_path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match="no model in"):
        nanophi.load(tmp_path)
    nanophi.save(tmp_path, tiny_model())
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        nanophi.load(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=r"model\.safetensors is missing"):
        nanophi.load(tmp_path)


def test_saving_over_a_split_model_leaves_no_index_of_it(tmp_path):
    """The old index was read first, and with it the old weights."""
    hf = PhiForCausalLM(HFConfig(**tiny_model().cfg.to_dict()))
    hf.save_pretrained(tmp_path, max_shard_size="60KB")
    model = tiny_model(seed=3)
    nanophi.save(tmp_path, model)
    assert torch.equal(nanophi.load(tmp_path)[0](IDS), model(IDS))


def test_unknown_devices_are_named():
    for name in ("foo", "cuda:99"):
        with pytest.raises(UserError, match=f"--device {name} cannot be used here"):
            nanophi.model.checkpoint.pick_device(name)


def test_the_same_weights_are_the_same_bytes(tmp_path):
    """With several metadata keys, the files of one model differed from process to process."""
    for name in ("a", "b"):
        nanophi.save(tmp_path / name, tiny_model())
    assert (tmp_path / "a/model.safetensors").read_bytes() == (
        tmp_path / "b/model.safetensors"
    ).read_bytes()


def test_the_probe_is_what_transformers_answers():
    """The numbers by which a changed network is recognised come from transformers, not from us."""
    hf = PhiForCausalLM(HFConfig(**PROBE.to_dict(), attn_implementation="eager")).eval()
    with torch.no_grad():
        for number, (_, p) in enumerate(sorted(hf.named_parameters())):
            wave = (torch.arange(p.numel()) * 0.7 + number).sin() * 0.5
            p.copy_(wave.view(p.shape))
        logits = hf(torch.arange(48)[None] % 7).logits[0, -1]
    assert torch.allclose(logits, torch.tensor(PROBE_LOGITS), atol=2e-5)


CHANGES = {
    "rotation by another base": ("rope_theta", 20_000.0),
    "another share of rotation": ("partial_rotary_factor", 1.0),
    "no grouped queries": ("num_key_value_heads", 4),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_the_probe_sees_small_changes(change, monkeypatch):
    """A first probe of five tokens and one frequency saw neither another base nor a window."""
    name, value = change
    monkeypatch.setattr(checkpoint, "PROBE", dataclasses.replace(checkpoint.PROBE, **{name: value}))
    with pytest.raises(UserError, match="does not compute what PhiForCausalLM computes"):
        check_architecture(tiny_model())


def test_the_probe_sees_a_window(monkeypatch):
    whole = attention.attention_weights

    def within_32(q, k, visible):
        near = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(-31)
        return whole(q, k, visible & near)

    monkeypatch.setattr(attention, "attention_weights", within_32)
    with pytest.raises(UserError, match="does not compute what PhiForCausalLM computes"):
        check_architecture(tiny_model())
