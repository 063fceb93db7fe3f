import torch

from nanophi import KVCache
from nanophi.model.attention import AttentionPlan, attend

DTYPES = {2: torch.float16, 4: torch.float32, 8: torch.float64}


def grouped_attention(q, k, v):
    return attend(q, k, v, AttentionPlan("manual"))


def cache_bytes(cfg, tokens, itemsize=4):
    like = torch.zeros((), dtype=DTYPES[itemsize])
    return KVCache(cfg, rows=1, room=tokens, like=like).store.nbytes


__all__ = ["cache_bytes", "grouped_attention"]
