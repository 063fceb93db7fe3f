"""Exercise 15: decode with a cache of keys and values, of your own."""

from typing import Any

from torch import Tensor

from nanophi import Phi

# You may use these two: rotary_tables(positions (1, T), cfg.rotary_dim, cfg.rope_theta) gives cos
# and sin for rotate(x (1, T, H, K), cos, sin).
from nanophi.model.phi import rotary_tables, rotate  # noqa: F401


def new_cache(model: Phi) -> Any:
    """An empty cache, of whatever form you like: keys and values of each layer."""
    raise NotImplementedError("write new_cache")


def forward(model: Phi, ids: list[int], cache: Any) -> Tensor:
    """The logits (T, V) of T new tokens, which follow those that the cache has seen.

    Afterwards the cache has seen them too. Only the new tokens are computed. Without a cache, the
    network is, with attention as in chapter 6:

        x = model.model.embed_tokens(ids)
        for block in model.model.layers:
            h = block.input_layernorm(x)
            x = x + attention(block.self_attn, h) + block.mlp(h)
        logits = model.lm_head(model.model.final_layernorm(x))

    block.self_attn has the layers q_proj, k_proj, v_proj and dense. Each head has cfg.head_dim
    dimensions, cfg = model.cfg, and there are as many key heads as query heads. Call the layers
    (`attention.k_proj(h)`), as the test counts the tokens that they compute.
    """
    raise NotImplementedError("write forward")


def decode(model: Phi, prompt: list[int], count: int) -> list[int]:
    """The next `count` ids: each time the likeliest one (greedy). Use new_cache and forward.

    The prompt is computed once, in one call. Each new id is then fed alone, and the last one not at
    all: nobody asks what follows it.
    """
    raise NotImplementedError("write decode")
