"""Phi, by hand: the network and nothing else, in the order in which one reads it.

Blocks are parallel, as in GPT-J and Phi-1.5 / Phi-2: attention and MLP read the same normalised
input, and both results are added to the residual stream.

        x ─┬─ LayerNorm ─┬─ attention ─┐
           │             └─ MLP ───────┤
           └───────────────────────────┴─ + ─> x

The parameters have the names of transformers' PhiForCausalLM, so that the `state_dict()` of either
loads into the other, and the same weights give the same logits (tests/model/test_phi.py). Two
things differ: the documents of a packed batch do not see each other, and the KV cache is
preallocated.

Initialisation: every Linear and Embedding weight Normal(0, initializer_range), every bias 0,
LayerNorm 1 and 0, without scaling by depth. The first loss is therefore close to ln(vocab_size).

attention.py computes attention. What makes training faster is put on from outside, by speed.py.

    B batch, T time, S keys, D width, H heads, K head_dim, R rotated dimensions of a head,
    F width of the MLP, V vocabulary, L layers
"""

import math
from copy import copy
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanophi.cli import UserError, row_named
from nanophi.model.attention import AttentionPlan, Branches, attend, plan_attention
from nanophi.model.backends import BACKENDS, preferred_kernels
from nanophi.model.config import PhiConfig

# lm_head.bias of ids that no tokenizer uses. It is finite, and the probability becomes exactly 0.
MASKED_BIAS = -1e4
DECODING_WEIGHTS = ("auto", "fp32", "fp16", "int8")


# ---- positions: rotary embedding


def rotary_tables(positions: Tensor, rotary_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles position * theta^(-2i/R), for i = 0 ... R/2 - 1.

    positions (B or 1, T) -> two tensors (B or 1, T, 1, R/2) in fp32. They are computed in each
    forward pass: a buffer would be rounded by `model.bfloat16()`. Source: Su et al. 2021
    (RoFormer), eq. 15.
    """
    exponents = torch.arange(0, rotary_dim, 2, device=positions.device).float() / rotary_dim
    frequencies = 1 / theta**exponents  # (R/2,)
    angles = positions[:, :, None, None].float() * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R dimensions of every head; the rest passes through. x (B, T, H, K).

    Dimensions i and i + R/2 are the coordinates of a point. It turns by the angle of its position
    (the paper pairs 2i and 2i + 1; GPT-NeoX and transformers do as here):

        R = 4    dimensions 0 1 2 3    points (0, 2) and (1, 3), the second one turns more slowly

    >>> quarter_turn = torch.tensor(torch.pi / 2).view(1, 1, 1, 1)
    >>> x = torch.tensor([1.0, 0.0, 5.0]).view(1, 1, 1, 3)  # R = 2 and one dimension that passes
    >>> rotate(x, quarter_turn.cos(), quarter_turn.sin()).flatten().round().abs()
    tensor([0., 1., 5.])
    """
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    cos = cos.to(x.dtype)
    sin = sin.to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


# ---- memory of a generation


class KVCache:
    """Keys and values of every layer, preallocated. With them, each step of decoding computes only
    the new tokens.

    Rows may hold different numbers of tokens. New tokens go behind those of their own row, and see
    these and themselves:

        lengths [2, 4]    row 0   感 冒 x _ _ _     the next token x is at position 2
                          row 1   你 是 谁 ？ x _                            position 4

    Prompts of unequal length are padded on the right. Whoever calls `Phi.hidden` with them sets
    `lengths` to the real ones afterwards: then nothing sees the padding, and new tokens overwrite
    it.
    """

    def __init__(self, cfg: PhiConfig, rows: int, room: int, like: Tensor):
        """Room for so many tokens in each row. like: has the dtype and the device"""
        shape = (cfg.num_hidden_layers, 2, rows, cfg.key_heads, room, cfg.head_dim)
        try:
            # Zeros, because a row sees the places behind its end with a weight of 0, and 0 * nan
            # is nan.
            self.store = torch.zeros(shape, dtype=like.dtype, device=like.device)
        except RuntimeError:
            gigabytes = math.prod(shape) * like.itemsize / 1e9
            raise UserError(
                f"keys and values of {rows} rows of {room:,} tokens take {gigabytes:,.0f} GB, more "
                "than there is: lower max_new_tokens"
            ) from None
        self.lengths = torch.zeros(rows, dtype=torch.int64)  # on the CPU, which plans the steps
        self.places = torch.zeros(0, dtype=torch.int64)
        self.start: int | None = 0

    def __repr__(self) -> str:
        rows, _, room = self.store.shape[2:5]
        return f"KVCache({int(self.lengths.max())} of {room} tokens, {rows} rows)"

    def part(self, first: int, stop: int) -> "KVCache":
        """The rows [first, stop) as a cache of their own, in the same memory."""
        part = copy(self)
        part.store = self.store[:, :, first:stop]
        part.lengths = self.lengths[first:stop]
        return part

    def move(self, source: int, target: int) -> None:
        """Give row `target` what row `source` holds."""
        length = int(self.lengths[source])
        self.store[:, :, target, :, :length] = self.store[:, :, source, :, :length]
        self.lengths[target] = length

    def swap(self, first: int, second: int) -> None:
        """Let two rows change places."""
        longest = int(self.lengths[[first, second]].max())
        held = self.store[:, :, [first, second], :, :longest]  # a copy
        self.store[:, :, [second, first], :, :longest] = held
        self.lengths[[second, first]] = self.lengths[[first, second]]

    def reorder(self, rows: list[int]) -> None:
        """Let row i hold what row rows[i] held."""
        longest = int(self.lengths.max())
        self.store[:, :, :, :, :longest] = self.store[:, :, rows, :, :longest]
        self.lengths[:] = self.lengths[rows]

    def begin(self, time: int) -> Tensor:
        """Prepare a pass over the next `time` tokens of each row: their positions, (B or 1, T)."""
        lengths = self.lengths.tolist()
        room = self.store.shape[4]
        end = max(lengths) + time
        assert end <= room, f"the KV cache holds {room} tokens, {end} are needed"
        is_even = min(lengths) == max(lengths)
        self.start = lengths[0] if is_even else None
        starts = self.lengths[:1] if is_even else self.lengths
        self.places = (starts[:, None] + torch.arange(time)).to(self.store.device)
        return self.places

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v (B, T, key heads, K) of one layer; return all that it holds.

        They are two tensors (B, key heads, S, K). S is that of the longest row.
        """
        return self.append(layer, torch.stack((k, v), dim=2))

    def append(self, layer: int, new: Tensor) -> tuple[Tensor, Tensor]:
        """`update` with keys and values in one tensor (B, T, 2, key heads, K)."""
        time = new.shape[1]
        held = self.store[layer]  # (2, B, key heads, room, K)
        if self.start is not None:
            end = self.start + time
            held[:, :, :, self.start : end] = new.permute(2, 0, 3, 1, 4)
        else:
            end = int(self.lengths.max()) + time
            rows = torch.arange(len(new), device=new.device)[:, None]
            held[:, rows, :, self.places] = new
        return held[0, :, :, :end], held[1, :, :, :end]

    def visible(self) -> Tensor | None:
        """What the queries of this pass see: bool (B or 1, 1, T, S); None for plain causal."""
        if self.start == 0:
            return None
        time = self.places.shape[1]
        keys = torch.arange(int(self.lengths.max()) + time, device=self.store.device)
        return (keys <= self.places[:, :, None])[:, None]


# ---- the network


class Attention(nn.Module):
    """Rotated queries and keys, and values of each head; attention; a projection to D."""

    def __init__(self, cfg: PhiConfig):
        super().__init__()
        self.cfg = cfg
        kv_dim = cfg.key_heads * cfg.head_dim
        self.q_proj = nn.Linear(cfg.hidden_size, cfg.hidden_size)
        self.k_proj = nn.Linear(cfg.hidden_size, kv_dim)
        self.v_proj = nn.Linear(cfg.hidden_size, kv_dim)
        self.dense = nn.Linear(cfg.hidden_size, cfg.hidden_size)
        if cfg.qk_layernorm:
            self.q_layernorm = nn.LayerNorm(cfg.head_dim, eps=cfg.layer_norm_eps)
            self.k_layernorm = nn.LayerNorm(cfg.head_dim, eps=cfg.layer_norm_eps)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        layer: int,
        cache: KVCache | None,
        plan: AttentionPlan,
    ) -> Tensor:
        heads = (*x.shape[:2], -1, self.cfg.head_dim)
        q = self.q_proj(x).view(heads)  # (B, T, H, K)
        k = self.k_proj(x).view(heads)
        v = self.v_proj(x).view(heads)
        if self.cfg.qk_layernorm:
            q = self.q_layernorm(q)
            k = self.k_layernorm(k)
        q = rotate(q, *rotary)
        k = rotate(k, *rotary)

        # (B, H, T, K) as a view: in memory the heads of a token stay together.
        q = q.transpose(1, 2)
        if cache is not None:
            k, v = cache.update(layer, k, v)
        else:
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        out = attend(q, k, v, plan)
        return self.dense(out.transpose(1, 2).flatten(2))  # (B, T, D)


class MLP(nn.Module):
    def __init__(self, cfg: PhiConfig):
        super().__init__()
        self.fc1 = nn.Linear(cfg.hidden_size, cfg.intermediate_size)
        self.fc2 = nn.Linear(cfg.intermediate_size, cfg.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.contract(self.fc1(x))  # (B, T, F) is the largest tensor of a block

    def contract(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(x, approximate="tanh"))  # transformers calls this gelu "gelu_new"


class Block(nn.Module):
    def __init__(self, cfg: PhiConfig):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)
        self.self_attn = Attention(cfg)
        self.mlp = MLP(cfg)
        self.dropout = nn.Dropout(cfg.resid_pdrop)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        layer: int,
        cache: KVCache | None,
        plan: AttentionPlan,
    ) -> Tensor:
        h = self.input_layernorm(x)  # one norm feeds both branches
        attended = self.self_attn(h, rotary, layer, cache, plan)
        return self.dropout(attended) + self.dropout(self.mlp(h)) + x


class Trunk(nn.Module):
    """All parts but the head. `Phi.hidden` is their forward pass."""

    def __init__(self, cfg: PhiConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.embed_dropout = nn.Dropout(cfg.embd_pdrop)
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.num_hidden_layers))
        self.final_layernorm = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)


def check_ids(ids: Tensor) -> None:
    """Refuse ids of another type or form. The ids themselves are not read, as they may be on a GPU.

    >>> check_ids(torch.tensor([5, 6, 7]))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    nanophi.cli.UserError: the model reads ids of the form (rows, tokens) ... not (3,) ...
    """
    if not isinstance(ids, Tensor):
        found = type(ids).__name__
    elif ids.dim() != 2 or ids.dtype != torch.int64 or not ids.numel():
        found = f"{tuple(ids.shape)} {ids.dtype}"
    else:
        return
    raise UserError(
        "the model reads ids of the form (rows, tokens) and the type torch.int64, not "
        f"{found}: one row is torch.tensor([ids])"
    )


@dataclass
class Record:
    """What a forward pass computes inside: `model(ids, record=record)` fills it, layer by layer.

    hidden:    L + 1 tensors (B, T, D): the embedding, then the stream after each block
    attention: L tensors (B, H, T, S): the attention weights. To have them, the pass uses the
               backend "manual"
    """

    hidden: list[Tensor] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)


class Phi(nn.Module):
    """The causal language model: `model(ids) -> logits`.

    attention: the backend, a name of backends.BACKENDS.
    """

    architecture = "PhiForCausalLM"
    """The name of this network in config.json. If you change what the network computes, give it
    another name here: otherwise transformers loads its weights without a word and computes
    something else. `save` and `train` check it.
    """

    decoding_weights = "fp32"
    """How `generate` keeps the weights: one of DECODING_WEIGHTS, see infer/products.py."""

    def __init__(self, cfg: PhiConfig, attention: str = "auto"):
        super().__init__()
        if not isinstance(cfg, PhiConfig):
            raise UserError(
                f"Phi takes a PhiConfig, not {cfg!r}: Phi(PhiConfig.preset('demo')), "
                "or nanophi.load(directory)"
            )
        row_named(BACKENDS, attention, "attention")
        self.cfg = cfg = copy(cfg)  # set_dropout changes it
        self.attention = attention
        self.model = Trunk(cfg)
        self.lm_head = nn.Linear(cfg.hidden_size, cfg.vocab_size)
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.cfg.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def hidden(
        self,
        ids: Tensor,
        cu_seqlens: Tensor | None = None,
        cache: KVCache | None = None,
        record: Record | None = None,
        branches: Branches | None = None,
        longest: int | None = None,
    ) -> Tensor:
        """ids (B, T) -> states before the head (B, T, D). The arguments are those of `forward`.

        longest: no document of cu_seqlens has more tokens; flash attention is faster with it
        """
        check_ids(ids)
        time = ids.shape[1]
        limit = self.cfg.max_position_embeddings
        if cache is None and cu_seqlens is None and time > limit:
            raise UserError(
                f"a row has {time} tokens, the model was made for {limit} positions: cut the "
                "text, or make the model with a larger max_position_embeddings"
            )
        positions, plan = plan_attention(
            self.attention,
            ids,
            cu_seqlens,
            cache,
            dtype=self.lm_head.weight.dtype,
            dropout=self.cfg.attention_dropout if self.training else 0.0,
            weights=None if record is None else record.attention,
            branches=branches,
            longest=longest,
        )
        rotary = rotary_tables(positions, self.cfg.rotary_dim, self.cfg.rope_theta)
        try:
            x = self.model.embed_dropout(self.model.embed_tokens(ids))  # (B, T, D)
        except IndexError:  # only of the CPU: to ask a GPU would be to wait for it
            raise UserError(
                f"ids are from {ids.min()} to {ids.max()}, the model knows 0 to "
                f"{self.cfg.vocab_size - 1}: encode the text with the model's own tokenizer"
            ) from None
        with preferred_kernels(ids.device, masked=plan.visible is not None):
            for layer, block in enumerate(self.model.layers):
                if record is not None:
                    record.hidden.append(x.detach())
                x = block(x, rotary, layer, cache, plan)
        if record is not None:
            record.hidden.append(x.detach())
        if cache is not None:
            cache.lengths += time
        return self.model.final_layernorm(x)

    def forward(
        self,
        ids: Tensor,
        cu_seqlens: Tensor | None = None,
        cache: KVCache | None = None,
        record: Record | None = None,
        branches: Branches | None = None,
    ) -> Tensor:
        """ids (B, T) int64 -> logits (B, T, V): at each place, those of the next token.

        cu_seqlens: (documents + 1,) int32, the boundaries of the documents in the flattened batch.
                    Every multiple of T is one, as no document crosses rows. Each document sees only
                    itself, and its positions start at 0
        cache:      the keys and values of what came before, one document a row
        record:     is filled with the hidden states and attention weights of each layer
        branches:   which documents continue others, as the two answers of a preference pair do
        """
        return self.lm_head(self.hidden(ids, cu_seqlens, cache, record, branches))

    # ---- changes to a finished model

    @torch.no_grad()
    def set_vocabulary(self, tokens: int) -> None:
        """Make the ids from `tokens` on impossible, and the ids below it possible again.

        vocab_size is len(tokenizer), rounded up to a multiple of 64. The spare rows get a bias of
        -1e4, so that no engine produces an id that the tokenizer cannot decode. After
        `tok.add_tokens`, call this with `len(tok)`.
        """
        rows = self.cfg.vocab_size
        assert tokens <= rows, f"{tokens} tokens do not fit in vocab_size {rows}"
        used = self.lm_head.bias[:tokens]
        used[used <= MASKED_BIAS / 2] = 0.0  # half of it, as another dtype may have rounded it
        self.lm_head.bias[tokens:] = MASKED_BIAS

    def set_dropout(self, share: float) -> None:
        """The same dropout everywhere: embeddings, attention weights, outputs of both branches."""
        self.cfg.embd_pdrop = share
        self.cfg.resid_pdrop = share
        self.cfg.attention_dropout = share
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = share
