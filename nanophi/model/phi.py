"""Phi, by hand: the network and nothing else, in the order one needs to read it.

Parallel blocks as in GPT-J and Phi-1.5 / Phi-2: attention and MLP read the same normalised input and add up.

        x ─┬─ LayerNorm ─┬─ attention ─┐
           │             └─ MLP ───────┤
           └───────────────────────────┴─ + ─> x

Parameter names are those of transformers' PhiForCausalLM, so `state_dict()` of either loads into the other. The same
weights give the same logits (tests/model/test_phi.py); what differs is that packed documents are isolated and that
the KV cache is preallocated.

Initialisation: every Linear and Embedding weight Normal(0, initializer_range), every bias 0, LayerNorm 1 and 0; no
scaling with depth. The first loss is therefore close to ln(vocab_size).

    B batch, T time, D width, H heads, K head_dim, R rotated dims, F width of the MLP, V vocabulary
"""

from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanophi.model.attention import (
    BACKENDS,
    attend,
    choose_backend,
    document_positions,
    flash_kernel,
    preferred_kernels,
    same_document,
)
from nanophi.model.config import PhiConfig
from nanophi.model.linear import Linear

MASKED_BIAS = -1e4  # lm_head.bias of ids that no tokenizer uses: a probability of exactly 0 in every dtype, and finite


def rotary_tables(positions: Tensor, rotary_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of every angle position * theta^(-2i/R). positions (B or 1, T) -> two (B or 1, T, 1, R/2), fp32.

    Su et al. 2021 (RoFormer), eq. 15. Computed in fp32 each time: a buffer would be rounded by `model.bfloat16()`.
    """
    frequencies = 1 / theta ** (
        torch.arange(0, rotary_dim, 2, device=positions.device).float() / rotary_dim
    )  # (R/2,)
    angles = positions[:, :, None, None].float() * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R dimensions of every head, paired (i, i + R/2); the rest passes through. x (B, T, H, K)."""
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


class KVCache:
    """Keys and values of every layer, preallocated; what makes decoding cost one token at a time.

    Prompts of unequal length are left-padded: `left_pad` (B,) says by how much, padded keys are seen by nobody but
    themselves, and positions start at each prompt's first real token.
    """

    def __init__(
        self, cfg: PhiConfig, batch: int, max_len: int, like: Tensor, left_pad: Tensor | None = None
    ):
        shape = (cfg.num_hidden_layers, 2, batch, cfg.num_key_value_heads, max_len, cfg.head_dim)
        self.store = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.length = (
            0  # tokens held by every layer; advanced by Phi.hidden once all layers have written
        )
        self.left_pad = left_pad

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v (B, Hkv, T, K) of one layer; return all of that layer's: two (B, Hkv, S, K)."""
        end = self.length + k.shape[2]
        assert end <= self.store.shape[4], (
            f"KV cache holds {self.store.shape[4]} tokens, {end} needed"
        )
        for which, new in enumerate((k, v)):
            self.store[layer, which, :, :, self.length : end] = new
        return tuple(self.store[layer, :, :, :, :end])

    def positions(self, time: int) -> Tensor:
        """Positions of the next `time` tokens: (B or 1, T)."""
        index = torch.arange(self.length, self.length + time, device=self.store.device)[None]
        return index if self.left_pad is None else (index - self.left_pad[:, None]).clamp(min=0)

    def visible(self, time: int) -> Tensor | None:
        """Which key each of the next `time` queries sees: bool (B or 1, 1, T, S), or None for plain causal."""
        if self.left_pad is None and self.length == 0:
            return None
        keys = torch.arange(self.length + time, device=self.store.device)
        queries = keys[self.length :, None]
        causal = keys <= queries  # (T, S)
        if self.left_pad is None:
            return causal[None, None]
        real = (
            keys >= self.left_pad[:, None, None]
        )  # (B, 1, S); a padded query sees itself, to keep softmax finite
        return ((causal & real) | (keys == queries))[:, None]


class Attention(nn.Module):
    def __init__(self, cfg: PhiConfig):
        super().__init__()
        self.cfg = cfg
        kv_dim = cfg.num_key_value_heads * cfg.head_dim
        self.q_proj = Linear(cfg.hidden_size, cfg.hidden_size)
        self.k_proj = Linear(cfg.hidden_size, kv_dim)
        self.v_proj = Linear(cfg.hidden_size, kv_dim)
        self.dense = Linear(cfg.hidden_size, cfg.hidden_size)
        if cfg.qk_layernorm:
            self.q_layernorm = nn.LayerNorm(cfg.head_dim, eps=cfg.layer_norm_eps)
            self.k_layernorm = nn.LayerNorm(cfg.head_dim, eps=cfg.layer_norm_eps)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], layer: int, cache: KVCache | None, **mask
    ) -> Tensor:
        split = (*x.shape[:2], -1, self.cfg.head_dim)
        q, k, v = (
            proj(x).view(split) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )  # (B, T, H, K)
        if self.cfg.qk_layernorm:
            q, k = self.q_layernorm(q), self.k_layernorm(k)
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # in memory a token's heads stay together
        if cache is not None:
            k, v = cache.update(layer, k, v)
        out = attend(q, k, v, dropout=self.cfg.attention_dropout if self.training else 0.0, **mask)
        return self.dense(out.transpose(1, 2).flatten(2))  # (B, T, D)


class MLP(nn.Module):
    def __init__(self, cfg: PhiConfig):
        super().__init__()
        self.fc1 = Linear(cfg.hidden_size, cfg.intermediate_size)
        self.fc2 = nn.Linear(
            cfg.intermediate_size, cfg.hidden_size
        )  # torch's: a checkpoint stops before its product

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)  # (B, T, F), the largest tensor of a block
        if (
            torch.is_grad_enabled()
        ):  # backward computes the cheap gelu again, or it would be kept too
            return checkpoint(self._second_half, x, use_reentrant=False, preserve_rng_state=False)
        return self._second_half(x)

    def _second_half(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(x, approximate="tanh"))  # HF calls it gelu_new


class Block(nn.Module):
    def __init__(self, cfg: PhiConfig):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)
        self.self_attn = Attention(cfg)
        self.mlp = MLP(cfg)
        self.dropout = nn.Dropout(cfg.resid_pdrop)

    def forward(self, x: Tensor, *args, **mask) -> Tensor:
        h = self.input_layernorm(x)  # one norm feeds both branches
        if torch.is_autocast_enabled(
            h.device.type
        ):  # once, or each of the four that read it would keep its own copy
            h = h.to(torch.get_autocast_dtype(h.device.type))
        return self.dropout(self.self_attn(h, *args, **mask)) + self.dropout(self.mlp(h)) + x


class Trunk(nn.Module):
    """Everything but the head: token ids -> hidden states."""

    def __init__(self, cfg: PhiConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.embed_dropout = nn.Dropout(cfg.embd_pdrop)
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.num_hidden_layers))
        self.final_layernorm = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)


class Phi(nn.Module):
    """The causal language model.

    `attention` chooses the backend, one of attention.BACKENDS. `recompute` (gradient checkpointing) keeps of each block
    its input alone and computes it again in backward: a third more work, a fraction of the memory.
    """

    recompute = compiled = False

    def __init__(self, cfg: PhiConfig, attention: str = "auto"):
        super().__init__()
        assert attention in BACKENDS, f"attention {attention!r} is none of {', '.join(BACKENDS)}"
        self.cfg, self.attention = cfg, attention
        self.model = Trunk(cfg)
        self.lm_head = Linear(cfg.hidden_size, cfg.vocab_size)
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.cfg.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    @torch.no_grad()
    def set_vocabulary(self, tokens: int) -> None:
        """Forbid every id from `tokens` on, and allow those below it that were forbidden.

        vocab_size is rounded up to a multiple of 64; the spare rows get a bias of -1e4, so that no engine ever
        produces an id that the tokenizer cannot decode. After `tok.add_tokens`, call this with the new `len(tok)`.
        """
        assert tokens <= self.cfg.vocab_size, (
            f"{tokens} tokens do not fit in vocab_size {self.cfg.vocab_size}"
        )
        bias = self.lm_head.bias
        bias[:tokens][bias[:tokens] <= MASKED_BIAS / 2] = 0.0
        bias[tokens:] = MASKED_BIAS

    def set_dropout(self, share: float) -> None:
        """The same dropout everywhere: embeddings, attention weights, and what both branches add."""
        self.cfg.embd_pdrop = self.cfg.resid_pdrop = self.cfg.attention_dropout = share
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = share

    def compile_blocks(self, on: bool = True) -> None:
        """torch.compile every block in place (names and state_dict stay), or take it back."""
        self.compiled = on
        for block in self.model.layers:
            if on:
                block.compile(dynamic=False)
            else:
                block._compiled_call_impl = (
                    None  # what nn.Module.compile sets; there is no public way back
                )

    def hidden(
        self, ids: Tensor, cu_seqlens: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """ids (B, T) -> the states before the head (B, T, D): what the chunked loss reads. Arguments as `forward`."""
        weight, time, device, visible = self.lm_head.weight, ids.shape[1], ids.device.type, None
        dtype = (
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        )
        dropout = self.cfg.attention_dropout if self.training else 0.0
        backend = choose_backend(self.attention, ids.device, dtype, dropout)
        if backend == "causal":
            cu_seqlens = None
        if cache is not None:
            assert cu_seqlens is None, "a KV cache holds one document per row"
            positions, visible = cache.positions(time), cache.visible(time)
        elif cu_seqlens is not None:
            positions = document_positions(cu_seqlens, ids.numel()).view(ids.shape)
            if backend not in ("documents", "varlen"):  # the mask is made once, for all layers
                cu_seqlens, visible = None, same_document(cu_seqlens, *ids.shape)
        else:
            positions = torch.arange(time, device=ids.device)[None]
        rotary = rotary_tables(positions, self.cfg.rotary_dim, self.cfg.rope_theta)
        x = self.model.embed_dropout(self.model.embed_tokens(ids))  # (B, T, D)
        mask = {"cu_seqlens": cu_seqlens, "visible": visible, "backend": backend}
        if backend == "varlen" and cu_seqlens is not None:
            mask["kernel"] = flash_kernel()  # found out here, not inside of what is compiled
            torch._dynamo.maybe_mark_dynamic(cu_seqlens, 0)  # one graph for any number of documents
        kernels = partial(preferred_kernels, ids.device, visible is not None)
        eager = (
            self.compiled and cache is not None
        )  # decoding would be compiled anew for each length of the cache
        with kernels(), torch.compiler.set_stance("force_eager") if eager else nullcontext():
            for i, block in enumerate(self.model.layers):
                if self.recompute and self.training:
                    again = lambda: (nullcontext(), kernels())  # noqa: E731  the same kernels in backward
                    x = checkpoint(
                        block, x, rotary, i, None, use_reentrant=False, context_fn=again, **mask
                    )
                else:
                    x = block(x, rotary, i, cache, **mask)
        if cache is not None:
            cache.length += time
        return self.model.final_layernorm(x)

    def forward(
        self, ids: Tensor, cu_seqlens: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """ids (B, T) int64 -> logits (B, T, V) for the token after each.

        cu_seqlens: (documents + 1,) int32 boundaries in the flattened batch, 0 and every multiple of T among them;
        each document then sees only itself and its positions start at 0. cache: what came before, one document a row.
        """
        return self.lm_head(self.hidden(ids, cu_seqlens, cache))
