"""Every wrong value of config.json is one line that names file, field and what it should be."""

import dataclasses
import json

import numpy as np
import pytest

from nanophi.cli import UserError
from nanophi.model.config import FIELDS, SHAPE, PhiConfig
from tests.conftest import tiny_config

NAN, INFINITE = float("nan"), float("inf")
WRONG = {
    "vocab_size": [-5, 0, "64", 2.0, True, 10**12, [64]],
    "hidden_size": ["64", 64.0, -64, 0, 10**12, np.int64(64)],
    "intermediate_size": ["64", -1, 0, 10**12],
    "num_hidden_layers": ["2", 0, 10**6, 2.0],
    "num_attention_heads": [0, -4, "4", True],
    "num_key_value_heads": [0, -1, "2", 1.0],
    "max_position_embeddings": [0, 1, -1, "512", 10**12],
    "partial_rotary_factor": [5, NAN, "0.5", 0, -0.5, True],
    "rope_theta": [0, -1, INFINITE, NAN, "1e4"],
    "layer_norm_eps": [-1, 0, NAN, "1e-5"],
    "qk_layernorm": [1, "true", []],
    "embd_pdrop": [5, -1, NAN, "0"],
    "resid_pdrop": [1.5, -0.1, {}],
    "attention_dropout": [-1, 2, NAN],
    "initializer_range": [-1, NAN, INFINITE, "0.02", 1e300],
    "pad_token_id": ["0", -1, 448, 0.0],
    "bos_token_id": ["x", -1, 448],
    "eos_token_id": ["x", [], [1, "x"], -1, 448, [1, 448], True, {}],
    "architectures": ["PhiForCausalLM", [5], {}],
    "model_type": [5, ["phi"]],
    "hidden_act": [5, []],
    "tie_word_embeddings": ["false", 0],
    "rope_parameters": ["x", [], 5],
    "rope_scaling": ["x"],
}
CASES = [(name, value) for name, values in WRONG.items() for value in values]


def test_each_field_has_wrong_values_here():
    names = {field.name for field in dataclasses.fields(PhiConfig)}
    assert names <= WRONG.keys()
    assert FIELDS.keys() <= names


@pytest.mark.parametrize(("name", "value"), CASES, ids=repr)
def test_a_wrong_value_is_named_with_its_file_and_its_field(name, value):
    """A config.json with hidden_size "64" was a TypeError within torch; eps -1 was accepted."""
    config = tiny_config().to_dict()
    if name in config["rope_parameters"]:
        del config["rope_parameters"]
    with pytest.raises(UserError) as error:
        PhiConfig.from_dict(config | {name: value}, where="out/config.json")
    message = str(error.value)
    assert message.startswith("out/config.json: ")
    assert name in message
    assert "written together with the weights" in message
    assert len(message) < 300


@pytest.mark.parametrize(("name", "value"), CASES, ids=repr)
def test_a_config_made_in_python_passes_the_same_table(name, value):
    if name in {field.name for field in dataclasses.fields(PhiConfig)}:
        with pytest.raises(UserError, match=name):
            tiny_config(**{name: value})


@pytest.mark.parametrize("name", SHAPE)
@pytest.mark.parametrize("way", ["missing", "null"])
def test_a_shape_that_is_not_there_is_not_guessed(name, way):
    """Without num_attention_heads a model was read with 12 heads, whatever it had."""
    config = tiny_config().to_dict() | {name: None}
    if way == "missing":
        del config[name]
    with pytest.raises(UserError, match=f"config.json: {name} is missing, expected a whole"):
        PhiConfig.from_dict(config)


@pytest.mark.parametrize("name", ["rope_theta", "partial_rotary_factor", "rope_type"])
def test_rope_parameters_are_checked_too(name):
    config = tiny_config().to_dict()
    config["rope_parameters"] |= {name: []}
    with pytest.raises(UserError, match=f"config.json: .*{name} is "):
        PhiConfig.from_dict(config)


def test_what_is_null_has_its_default():
    config = tiny_config().to_dict()
    nothing = dict.fromkeys(set(config) - {*SHAPE, "model_type"})
    assert PhiConfig.from_dict(config | nothing) == tiny_config()


def test_other_heads_bring_other_key_heads():
    """`replace(preset, num_attention_heads=8)` kept the 4 key heads of before."""
    four = tiny_config(num_attention_heads=4)
    eight = dataclasses.replace(four, num_attention_heads=8, partial_rotary_factor=1.0)
    assert (four.key_heads, eight.key_heads) == (4, 8)
    assert eight.to_dict()["num_key_value_heads"] == 8
    grouped = dataclasses.replace(tiny_config(num_key_value_heads=2), num_attention_heads=2)
    assert grouped.key_heads == 2
    assert tiny_config(num_key_value_heads=4) == tiny_config()


def test_json_is_what_was_checked():
    assert PhiConfig.from_dict(json.loads(json.dumps(tiny_config().to_dict()))) == tiny_config()
