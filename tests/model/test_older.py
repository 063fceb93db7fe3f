"""Models of the time before transformers knew Phi, made up from ours by renaming backwards."""

import json

import pytest
import torch
from safetensors.torch import save_file

import nanophi
from nanophi.cli import UserError
from nanophi.model import older
from tests.conftest import tiny_model

IDS = torch.arange(5, 45).view(2, 20)


def written_as_before(directory, model, **changes) -> None:
    """The files of a model as microsoft/phi-1_5 first had them."""
    directory.mkdir(exist_ok=True)
    cfg = model.cfg
    config = {
        "model_type": "phi-msft",
        "architectures": ["PhiForCausalLM"],
        "activation_function": "gelu_new",
        "n_embd": cfg.hidden_size,
        "n_head": cfg.num_attention_heads,
        "n_head_kv": cfg.num_key_value_heads,
        "n_layer": cfg.num_hidden_layers,
        "n_inner": cfg.intermediate_size,
        "n_positions": cfg.max_position_embeddings,
        "rotary_dim": cfg.rotary_dim,
        "vocab_size": cfg.vocab_size,
        "layer_norm_epsilon": cfg.layer_norm_eps,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    }
    (directory / "config.json").write_text(json.dumps(config | changes))
    state = model.state_dict()
    tensors = {}
    for leaf in ("weight", "bias"):
        tensors[f"lm_head.ln.{leaf}"] = state[f"model.final_layernorm.{leaf}"]
        tensors[f"lm_head.linear.{leaf}"] = state[f"lm_head.{leaf}"]
        for n in range(cfg.num_hidden_layers):
            new, old = f"model.layers.{n}", f"transformer.h.{n}"
            fused = [state[f"{new}.self_attn.{letter}_proj.{leaf}"] for letter in "qkv"]
            tensors[f"{old}.mixer.Wqkv.{leaf}"] = torch.cat(fused)
            tensors[f"{old}.ln.{leaf}"] = state[f"{new}.input_layernorm.{leaf}"]
            tensors[f"{old}.mixer.out_proj.{leaf}"] = state[f"{new}.self_attn.dense.{leaf}"]
            for part in ("fc1", "fc2"):
                tensors[f"{old}.mlp.{part}.{leaf}"] = state[f"{new}.mlp.{part}.{leaf}"]
    tensors["transformer.embd.wte.weight"] = state["model.embed_tokens.weight"]
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 2, "partial_rotary_factor": 0.25}])
def test_older_models_load(tmp_path, changes):
    model = tiny_model(**changes)
    written_as_before(tmp_path, model)
    again, _ = nanophi.load(tmp_path)
    assert again.cfg == model.cfg
    assert torch.equal(again(IDS), model(IDS))


def test_without_a_width_the_mlp_is_four_times_the_model(tmp_path):
    model = tiny_model(intermediate_size=128)
    written_as_before(tmp_path, model, n_inner=None)
    assert torch.equal(nanophi.load(tmp_path)[0](IDS), model(IDS))


def test_what_they_become_is_a_model_of_today(tmp_path):
    model = tiny_model()
    written_as_before(tmp_path / "before", model)
    again, _ = nanophi.load(tmp_path / "before")
    nanophi.save(tmp_path / "today", again)
    assert torch.equal(nanophi.load(tmp_path / "today")[0](IDS), model(IDS))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_head": None}, "n_head"),
        ({"rotary_dim": "8"}, "rotary_dim"),
        ({"n_head": 5}, "not a multiple of n_head"),
        ({"n_head_kv": 1}, r"Wqkv\.\w+ has 96 rows, config\.json says 48"),
        ({"activation_function": "relu"}, "hidden_act 'relu'"),
        ({"n_embd": 10**9}, "hidden_size"),
    ],
)
def test_what_is_wrong_in_them_is_named(tmp_path, changes, message):
    written_as_before(tmp_path, tiny_model(), **changes)
    with pytest.raises(UserError, match=message):
        nanophi.load(tmp_path)


def test_names_of_no_network_stay():
    tensors = {"transformer.h.0.mixer.rotary_emb.inv_freq": torch.zeros(2)}
    assert older.weights_of(tensors, tiny_model().cfg) == tensors
