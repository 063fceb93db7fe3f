from dataclasses import replace

import torch
import torch.nn.functional as F

import nanophi
from nanophi.model.attention import AttentionPlan, attend


def qkv(heads, key_heads, batch=2, time=7, width=6):
    generator = torch.Generator().manual_seed(heads + key_heads)
    return tuple(
        torch.randn(batch, count, time, width, generator=generator, dtype=torch.float64)
        for count in (heads, key_heads, key_heads)
    )


def test_which_query_head_reads_which_key_head(mine):
    """All values of key head g are g, so each output says whose values it has read."""
    q, k, _ = qkv(6, 2)
    v = torch.arange(2.0, dtype=torch.float64)[None, :, None, None].expand_as(k)
    out = mine.grouped_attention(q, k, v)
    assert out.shape == q.shape, f"q is {tuple(q.shape)}, your result {tuple(out.shape)}"
    read = [round(head.mean().item(), 3) for head in out[0]]
    expected = [0, 0, 0, 1, 1, 1]
    assert read == expected, f"6 query heads read the key heads {expected}, yours read {read}"


def test_a_single_key_head_serves_all(mine):
    """Multi-query attention (Shazeer 2019)."""
    q, k, v = qkv(4, 1)
    found = mine.grouped_attention(q, k, v)
    expected = F.scaled_dot_product_attention(
        q, k.expand(2, 4, 7, 6), v.expand(2, 4, 7, 6), is_causal=True
    )
    close(found, expected, "4 query heads, 1 key head")


def test_with_as_many_key_heads_it_is_plain_attention(mine):
    q, k, v = qkv(3, 3)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    close(mine.grouped_attention(q, k, v), expected, "3 query heads, 3 key heads")


def test_no_token_sees_a_later_one(mine):
    q, k, v = qkv(4, 2)
    before = mine.grouped_attention(q, k, v)
    k[:, :, 4:] += 1
    v[:, :, 4:] += 1
    after = mine.grouped_attention(q, k, v)
    close(after[:, :, :4], before[:, :, :4], "tokens 0 to 3, after 4 to 6 have changed")
    assert not torch.allclose(after[:, :, 4:], before[:, :, 4:]), "token 4 does not see itself"


def test_it_is_attention_with_repeated_keys_and_that_of_the_library(mine):
    for heads, key_heads in ((4, 2), (6, 2), (6, 3), (8, 1)):
        q, k, v = qkv(heads, key_heads)
        found = mine.grouped_attention(q, k, v)
        times = heads // key_heads
        repeated = [x.repeat_interleave(times, dim=1) for x in (k, v)]
        name = f"{heads} query heads, {key_heads} key heads"
        close(found, F.scaled_dot_product_attention(q, *repeated, is_causal=True), name)
        close(found, attend(q, k, v, AttentionPlan("manual")), f"{name}, nanophi")


def close(found, expected, name):
    assert found.shape == expected.shape, f"{name}: {tuple(found.shape)}, not {expected.shape}"
    apart = (found - expected).abs().max()
    assert apart < 1e-9, f"{name}: {apart:.2g} away"


def test_the_bytes_of_the_cache(mine):
    cfg = nanophi.PhiConfig.preset("demo")
    for key_heads in (None, 3, 1):
        grouped = replace(cfg, num_key_value_heads=key_heads)
        for tokens, dtype in ((1, torch.float32), (512, torch.float16)):
            like = torch.zeros((), dtype=dtype)
            cache = nanophi.KVCache(grouped, rows=1, room=tokens, like=like)
            found = mine.cache_bytes(grouped, tokens, dtype.itemsize)
            expected = cache.store.nbytes
            assert found == expected, (
                f"{grouped.key_heads} key heads, {tokens} tokens, {dtype}: a KVCache takes "
                f"{expected:,} bytes, you say {found:,}"
            )
