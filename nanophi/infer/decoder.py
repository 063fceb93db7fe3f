"""The network once more, for decoding: few tokens a step, many steps.

`Decoder(model)` has what decoding asks of a `Phi`, and gives the same:

    hidden(ids, cache=cache)    ids (B, T), a KVCache -> states (B, T, D)
    lm_head(states)             (..., D) -> logits (..., V)

What it leaves out is the work around the products, which for one token takes as long as they do:

    q, k, v and fc1 read the same input     one product in place of four
    dense and fc2 are added                 one product in place of two
    the tables of the rotary embedding      computed once, for all positions
    q and k are turned                      in place, together, as complex numbers
    k and v lie side by side                one copy moves both into the cache
    a single query                          sees all keys: no mask

Skip this file at first reading: phi.py is the network. `decoder_of(model)` compares both on some
tokens, so that a network that somebody has changed is decoded by itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from nanophi.cli import UserError, row_named
from nanophi.infer.products import PRODUCTS, Matrix, Product, why_not
from nanophi.model.config import PhiConfig
from nanophi.model.phi import MASKED_BIAS, KVCache, Phi, rotary_tables


@dataclass
class Layer:
    """One block, prepared."""

    norm: Matrix
    into: Product  # (..., D) -> (..., D + 2 * key heads * K + F): q, k, v, fc1
    out: Product  # (..., D + F) -> (..., D): dense + fc2
    q_norm: Matrix | None = None
    k_norm: Matrix | None = None


class Decoder:
    """A model whose weights are prepared. It keeps what they were: make it anew when they change.

    weights: a name of products.PRODUCTS
    """

    @torch.no_grad()
    def __init__(self, model: Phi, weights: str = "fp32"):
        self.weights = weights
        make = self.product()
        self.cfg = cfg = model.cfg
        self.device = model.device
        self.embedding = model.model.embed_tokens.weight.detach()
        self.final_norm = vector_of(model.model.final_layernorm)
        self.lm_head: Product = make(*matrix_of(model.lm_head))
        self.layers = []
        block: Any
        pairs = as_pairs(cfg).to(self.device)
        for block in model.model.layers:
            attention, mlp = block.self_attn, block.mlp
            into = one_below_the_other(
                matrix_of(attention.q_proj, pairs),
                matrix_of(attention.k_proj, pairs),
                matrix_of(attention.v_proj),
                matrix_of(mlp.fc1),
            )
            out = side_by_side(matrix_of(attention.dense), matrix_of(mlp.fc2))
            layer = Layer(vector_of(block.input_layernorm), make(*into), make(*out))
            if cfg.qk_layernorm:
                layer.q_norm = vector_of(attention.q_layernorm, pairs)
                layer.k_norm = vector_of(attention.k_layernorm, pairs)
            self.layers.append(layer)
        positions = torch.arange(cfg.max_position_embeddings, device=self.device)[:, None]
        cos, sin = rotary_tables(positions, cfg.rotary_dim, cfg.rope_theta)
        self.turns = torch.complex(cos, sin)[:, 0]  # (positions, 1, R/2)

    def product(self) -> Callable[..., Product]:
        """What makes a product of a weight and a bias."""
        return row_named(PRODUCTS, self.weights, "precision of weights")

    def hidden(self, ids: Tensor, cache: KVCache) -> Tensor:
        """The states (B, T, D) of the next T tokens of each row, as `Phi.hidden` gives them."""
        cfg = self.cfg
        batch, time = ids.shape
        heads, key_heads, size = cfg.num_attention_heads, cfg.key_heads, cfg.head_dim
        queries, keys_and_queries = heads * size, (heads + key_heads) * size
        attended_end = queries + 2 * key_heads * size

        places = cache.begin(time)
        turns = self.turns[places]  # (B or 1, T, 1, R/2)
        alone = time == 1 and cache.start is not None
        visible = None if alone else cache.visible()
        causal = visible is None and not alone
        x = F.embedding(ids, self.embedding)
        for number, layer in enumerate(self.layers):
            y = layer.into(self.normed(x, layer.norm))
            turned = y[..., :keys_and_queries].view(batch, time, heads + key_heads, size)
            if layer.q_norm is not None and layer.k_norm is not None:
                turned[:, :, :heads] = self.normed(turned[:, :, :heads], layer.q_norm)
                turned[:, :, heads:] = self.normed(turned[:, :, heads:], layer.k_norm)
            first = turned[..., : cfg.rotary_dim].unflatten(-1, (-1, 2))
            turn(first, turns)
            new = y[..., queries:attended_end].view(batch, time, 2, key_heads, size)
            keys, values = cache.append(number, new)
            q = turned[:, :, :heads].transpose(1, 2)  # (B, H, T, K)
            attended = self.attend(q, keys, values, visible, causal)
            attended = attended.transpose(1, 2).reshape(batch, time, queries)
            expanded = F.gelu(y[..., attended_end:], approximate="tanh")
            x.add_(layer.out(torch.cat((attended, expanded), -1)))
        cache.lengths += time
        return self.normed(x, self.final_norm)

    def attend(
        self, q: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None, causal: bool
    ) -> Tensor:
        """Attention: q (B, H, T, K), keys and values (B, key heads, S, K) -> (B, H, T, K)."""
        grouped = self.cfg.num_attention_heads != self.cfg.key_heads
        return F.scaled_dot_product_attention(
            q, keys, values, visible, is_causal=causal, enable_gqa=grouped
        )

    def normed(self, x: Tensor, norm: Matrix) -> Tensor:
        """LayerNorm of x (..., D)."""
        weight, bias = norm
        return torch.layer_norm(x, weight.shape, weight, bias, self.cfg.layer_norm_eps)


def turn(pairs: Tensor, turns: Tensor) -> None:
    """Turn points (..., R/2, 2) in place, as complex numbers.

    >>> point = torch.tensor([[5.0, 1.0]])
    >>> turn(point, torch.tensor([1j]))  # by a quarter
    >>> point
    tensor([[-1.,  5.]])
    """
    if pairs.dtype == torch.float32:
        torch.view_as_complex(pairs).mul_(turns)
    else:  # there are no complex numbers in bf16
        turned = torch.view_as_complex(pairs.float()) * turns
        pairs.copy_(torch.view_as_real(turned))


def as_pairs(cfg: PhiConfig) -> Tensor:
    """The order of a head's dimensions in which the two that turn together are neighbours: (K,).

    phi.rotate turns dimensions i and i + R/2 as one point. Side by side they are one complex number
    a + bi, and to turn it is to multiply it by cos + i sin. With R = 4 and K = 6:

        dimension    0 1 2 3 4 5      points (0, 2) and (1, 3)
        in order     0 2 1 3 4 5

    The products q k do not change, as both have the new order.
    """
    half = cfg.rotary_dim // 2
    turning = torch.arange(2 * half).view(2, half).t().flatten()
    return torch.cat((turning, torch.arange(2 * half, cfg.head_dim)))


def matrix_of(linear: Any, order: Tensor | None = None) -> Matrix:
    """Weight (N, K) and bias (N,) of a layer. order: of the dimensions of each head"""
    weight, bias = linear.weight.detach(), linear.bias.detach()
    if order is None:
        return weight, bias
    weight = weight.view(-1, len(order), weight.shape[1])[:, order].flatten(0, 1)
    return weight, bias.view(-1, len(order))[:, order].flatten()


def one_below_the_other(*parts: Matrix) -> Matrix:
    """Layers that read the same input as one: their outputs stand side by side."""
    weights, biases = zip(*parts, strict=True)
    return torch.cat(weights), torch.cat(biases)


def side_by_side(*parts: Matrix) -> Matrix:
    """Layers whose outputs are added as one: their inputs stand side by side."""
    weights, biases = zip(*parts, strict=True)
    return torch.cat(weights, 1), torch.stack(biases).sum(0)


def vector_of(norm: Any, order: Tensor | None = None) -> Matrix:
    """Weight and bias (D,) of a LayerNorm."""
    weight, bias = norm.weight.detach(), norm.bias.detach()
    return (weight, bias) if order is None else (weight[order], bias[order])


# ---- which model can be prepared

PROBE = 6  # tokens on which both networks are compared
SAMPLE = 64  # numbers of each weight that are looked at for changes
CLOSE = {"fp32": 1e-3, "fp16": 1e-2, "int8": 0.3}  # of the largest logit


# What was prepared last for each model, by its precision and weights. It goes with the model, and
# is no part of it: a copy or a pickle of the model holds nothing of this.
KEPT: "WeakKeyDictionary[Phi, tuple[tuple, Decoder | str]]" = WeakKeyDictionary()


def decoder_of(model: Phi, weights: str | None = None) -> "Decoder | Phi":
    """What decodes for a model: its Decoder, kept with it until its weights change; or the model
    itself where a Decoder would compute something else, and on GPUs.

    weights: "fp32", "fp16", "int8", or "auto", which is fp16 where that is possible; by default
        `model.decoding_weights`
    """
    weights = weights or model.decoding_weights
    if weights != "auto":
        row_named(PRODUCTS, weights, "precision of weights")
    chosen = "fp16" if weights == "auto" else weights
    reason = why_not_prepared(model) or why_not(chosen)
    if reason is None:
        state = (chosen, state_of(model))
        kept = KEPT.get(model)
        if kept is None or kept[0] != state:
            kept = KEPT[model] = (state, prepared(model, chosen))
        made = kept[1]
        if isinstance(made, Decoder):
            return made
        reason = made
    if weights == "auto":
        return decoder_of(model, "fp32")
    if weights != "fp32":
        raise UserError(f"--weights {weights} cannot be used: {reason}")
    return model


def why_not_prepared(model: Phi) -> str | None:
    """Why a model decodes by itself, without a look at what it computes."""
    if model.device.type != "cpu" or model.lm_head.weight.dtype != torch.float32:
        return "it is for models in fp32 on a CPU"
    if model.training:
        return "the model is being trained; call model.eval()"
    if any(hasattr(p, "full_tensor") for p in model.parameters()):  # torch's DTensor
        return "the model is split over ranks"
    return None


def prepared(model: Phi, weights: str) -> "Decoder | str":
    """The Decoder of a model, or why there is none."""
    try:
        decoder = Decoder(model, weights)
        if computes_the_same(decoder, model, CLOSE[weights]):
            return decoder
    except AttributeError:  # a network with other parts
        pass
    except UserError as error:
        return str(error)
    return "it is for the network of nanophi/model/phi.py, and this one computes something else"


def state_of(model: Phi) -> tuple:
    """Changes when any weight does, by an optimizer or by hand."""
    parameters = [p.detach() for p in model.parameters()]
    beginnings = torch.cat([p.flatten()[:SAMPLE].float() for p in parameters])
    places = tuple((p.data_ptr(), p._version) for p in parameters)
    return (places, beginnings.numpy().tobytes())


@torch.inference_mode()
def computes_the_same(
    network: "Decoder | Phi",
    model: Phi,
    close: float,
    behind: Callable[[KVCache], KVCache] = lambda filled: filled,
) -> bool:
    """Whether two networks give the same logits for some tokens: one from a cache, and the model.

    close: how far they may differ, as a share of the largest logit
    behind: makes the cache of the last token out of that of the others
    """
    time = min(PROBE, model.cfg.max_position_embeddings)
    ids = torch.arange(time, device=model.device)[None] * 7 % model.cfg.vocab_size
    first, last = ids.split([time - 1, 1], dim=1)
    cache = KVCache(model.cfg, 1, time, model.lm_head.weight)
    ours = [network.hidden(first, cache=cache), network.hidden(last, cache=behind(cache))]
    logits = network.lm_head(torch.cat(ours, 1))
    # With a cache, because a compiled model would be compiled anew for these few tokens.
    expected = model(ids, cache=KVCache(model.cfg, 1, time, model.lm_head.weight))
    if not expected.isfinite().all():
        return True  # damaged weights: `choose` will say so
    used = expected > MASKED_BIAS / 2
    difference = (logits - expected)[used].abs().max()
    return bool(difference <= close * expected[used].abs().max())
