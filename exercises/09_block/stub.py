"""Exercise 9: a Phi model from its weights, without nn.Module.

B batch, T time, D width, H heads, K = D / H, R rotated dimensions, F width of the MLP, V vocabulary
"""

from collections.abc import Mapping

from torch import Tensor

Weights = Mapping[str, Tensor]


def block(x: Tensor, weights: Weights, heads: int, rotary_dim: int) -> Tensor:
    """One parallel block on plain rows, causal: x (B, T, D) -> (B, T, D).

    x + attention(norm(x)) + MLP(norm(x)), with one norm for both.

        input_layernorm.weight, .bias                        (D,)      LayerNorm, eps 1e-5
        self_attn.q_proj.weight, .bias; k_proj, v_proj too   (D, D), (D,)
        self_attn.dense.weight, .bias                        (D, D), (D,)
        mlp.fc1.weight, .bias                                (F, D), (F,)
        mlp.fc2.weight, .bias                                (D, F), (D,)

    A weight (outputs, inputs) is used as F.linear(x, weight, bias). The head h of q has its
    dimensions h K ... (h + 1) K - 1. Rotate the first R dimensions of every head of q and k, at the
    positions 0 ... T - 1, with theta 10000. Between fc1 and fc2 stands gelu in its tanh form.
    """
    raise NotImplementedError("write block")


def logits(ids: Tensor, weights: Weights, layers: int, heads: int, rotary_dim: int) -> Tensor:
    """The whole model: ids (B, T) -> logits (B, T, V).

    The names of its weights, as in `model.state_dict()`:

        model.embed_tokens.weight                            (V, D)
        model.layers.0.input_layernorm.weight ...            the weights of block 0, and so on
        model.final_layernorm.weight, .bias                  (D,)
        lm_head.weight, .bias                                (V, D), (V,)
    """
    raise NotImplementedError("write logits")
