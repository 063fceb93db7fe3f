"""Models of the time before transformers knew Phi: microsoft/phi-1, phi-1.5 and phi-2 as they first
were, and what others made of them. Their model_type is "phi-msft".

    config.json     n_embd 2048, n_layer 24, n_head 32, rotary_dim 32, ...
    weights         transformer.h.0.mixer.Wqkv.weight (3 D, D), ...

The network is the same. Names change, and the fused matrix of queries, keys and values is cut:

    Wqkv (H K + 2 key heads * K, D)      q_proj (H K, D)
                                         k_proj (key heads * K, D)
                                         v_proj (key heads * K, D)
"""

from torch import Tensor

from nanophi.cli import UserError
from nanophi.expect import Expected, check_fields
from nanophi.model.config import PhiConfig

MODEL_TYPE = "phi-msft"

# What config.json calls the fields of PhiConfig.
CONFIG_NAMES = {
    "n_embd": "hidden_size",
    "n_inner": "intermediate_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_head_kv": "num_key_value_heads",
    "n_positions": "max_position_embeddings",
    "layer_norm_epsilon": "layer_norm_eps",
    "activation_function": "hidden_act",
    "attn_pdrop": "attention_dropout",
}
NEEDED = ("n_embd", "n_layer", "n_head", "rotary_dim")

NAMES = {
    "transformer.embd.wte": "model.embed_tokens",
    "lm_head.ln": "model.final_layernorm",
    "lm_head.linear": "lm_head",
}
NAMES_IN_LAYER = {
    "ln": "input_layernorm",
    "mixer.out_proj": "self_attn.dense",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
LAYER = "transformer.h."
FUSED = "mixer.Wqkv"


def config_of(config: dict, where: str) -> dict:
    """The config.json of such a model with the names of today."""
    numbers = dict.fromkeys(NEEDED, Expected(int, at_least=1))
    check_fields(config, numbers, where, "take the one that was written with the weights")
    if config["n_embd"] % config["n_head"]:
        raise UserError(f"{where}: n_embd is not a multiple of n_head")
    today = {CONFIG_NAMES.get(name, name): value for name, value in config.items()}
    if today.get("intermediate_size") is None:
        today["intermediate_size"] = 4 * config["n_embd"]
    head_dim = config["n_embd"] // config["n_head"]
    return today | {
        "model_type": "phi",
        "partial_rotary_factor": config["rotary_dim"] / head_dim,
    }


def weights_of(tensors: dict[str, Tensor], cfg: PhiConfig) -> dict[str, Tensor]:
    """The tensors with the names of today. What has no place in the network keeps its name.

    The tensors may be on the device "meta", where they have shapes alone.
    """
    today: dict[str, Tensor] = {}
    rows = [heads * cfg.head_dim for heads in (cfg.num_attention_heads, *[cfg.key_heads] * 2)]
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        number, _, part = module.removeprefix(LAYER).partition(".")
        layer = f"model.layers.{number}"
        if module in NAMES:
            today[f"{NAMES[module]}.{leaf}"] = tensor
        elif not module.startswith(LAYER):
            today[name] = tensor
        elif part == FUSED:
            if len(tensor) != sum(rows):
                raise UserError(f"{name} has {len(tensor)} rows, config.json says {sum(rows)}")
            for letter, own in zip("qkv", tensor.split(rows), strict=True):
                today[f"{layer}.self_attn.{letter}_proj.{leaf}"] = own
        elif part in NAMES_IN_LAYER:
            today[f"{layer}.{NAMES_IN_LAYER[part]}.{leaf}"] = tensor
        else:
            today[name] = tensor
    return today
