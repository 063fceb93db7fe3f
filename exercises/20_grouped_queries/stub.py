"""Exercise 20: attention in which several query heads share one head of keys and values."""

from torch import Tensor

from nanophi import PhiConfig


def grouped_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention. q (B, H, T, K); k and v (B, G, T, K), and H is a multiple of G.

    The first H / G query heads read key head 0, the next H / G read key head 1, and so on. Returns
    (B, H, T, K): softmax(q k^T / sqrt(K)) v, where token t sees the tokens 0 to t.
    """
    raise NotImplementedError("write grouped_attention")


def cache_bytes(cfg: PhiConfig, tokens: int, itemsize: int = 4) -> int:
    """The bytes of a KV cache for so many tokens of one row: keys and values of all layers.

    itemsize: bytes of a number, 4 in fp32. Of cfg you need num_hidden_layers, key_heads (G) and
    head_dim (K).
    """
    raise NotImplementedError("write cache_bytes")
