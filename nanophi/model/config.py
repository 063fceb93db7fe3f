"""What shape a Phi model has: HF's field names, the presets, and config.json as every engine reads it."""

from dataclasses import asdict, dataclass

from nanophi.cli import UserError


@dataclass
class PhiConfig:
    """Shape of a Phi model. Defaults are the released Phi2-mini-Chinese "0.2B"."""

    vocab_size: int = 35840
    """rows of the embedding and of lm_head; a multiple of 64, so it may exceed len(tokenizer)"""
    hidden_size: int = 768
    """D, the width of the residual stream"""
    intermediate_size: int = 4096
    """width of the MLP; not bound to 4 D"""
    num_hidden_layers: int = 16
    num_attention_heads: int = 12
    """H; the head width K is D / H"""
    num_key_value_heads: int | None = None
    """fewer than H: grouped-query attention (Ainslie et al. 2023); None: H"""
    max_position_embeddings: int = 512
    """longest context trained on, in tokens"""
    partial_rotary_factor: float = 0.5
    """share of each head's dimensions that is rotated; Phi's library default 0.5, microsoft/phi-2 0.4"""
    rope_theta: float = 10000.0
    layer_norm_eps: float = 1e-5
    qk_layernorm: bool = False
    """LayerNorm over each head's q and k, before the rotation"""
    embd_pdrop: float = 0.0
    resid_pdrop: float = 0.0
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    """standard deviation of every Linear and Embedding weight at creation"""
    pad_token_id: int = 0
    eos_token_id: int | list[int] = 1
    bos_token_id: int = 3

    def __post_init__(self):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size {self.hidden_size} is not a multiple of {self.num_attention_heads} heads"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.rotary_dim % 2 or self.rotary_dim == 0:
            raise UserError(
                f"partial_rotary_factor {self.partial_rotary_factor} of head_dim {self.head_dim} rotates "
                f"{self.rotary_dim} dimensions; rotation works on pairs: choose a factor that gives an even number"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)

    @classmethod
    def preset(cls, name: str, **overrides) -> "PhiConfig":
        """A named shape, single fields overridden: `PhiConfig.preset("demo", vocab_size=2048)`."""
        if name not in PRESETS:
            raise UserError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
        return cls(**PRESETS[name] | overrides)

    @classmethod
    def from_dict(cls, config: dict) -> "PhiConfig":
        """Read an HF config.json of model_type "phi", as transformers 4 and 5 write it."""
        if config.get("model_type") != "phi":
            raise UserError(
                f"config.json has model_type {config.get('model_type')!r}; only 'phi' can be loaded"
            )
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        for key, value, expected in (
            ("hidden_act", config.get("hidden_act", "gelu_new"), "gelu_new"),
            ("tie_word_embeddings", config.get("tie_word_embeddings", False), False),
            ("rope_type", rope.get("rope_type", rope.get("type", "default")), "default"),
        ):
            if value != expected:
                raise UserError(f"config.json has {key} {value!r}; only {expected!r} is supported")
        fields = {
            name: config[name] for name in cls.__dataclass_fields__ if config.get(name) is not None
        }
        fields |= {k: rope[k] for k in ("rope_theta", "partial_rotary_factor") if k in rope}
        return cls(**fields)

    def to_dict(self) -> dict:
        """config.json for transformers 4.57 and 5.x, vLLM and llama.cpp.

        RoPE is said in both forms (5.x reads rope_parameters, 4.x the top-level keys), and the MLP's width also as
        `n_inner`, because some engines ignore intermediate_size and assume 4 x hidden_size.
        """
        return asdict(self) | {
            "architectures": ["PhiForCausalLM"],
            "model_type": "phi",
            "hidden_act": "gelu_new",
            "tie_word_embeddings": False,
            "use_cache": True,
            "n_inner": self.intermediate_size,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": self.rope_theta,
                "partial_rotary_factor": self.partial_rotary_factor,
            },
            "torch_dtype": "float32",
        }


def _shape(hidden, heads, layers, mlp, vocab, context=512, **more) -> dict:
    return {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "intermediate_size": mlp,
        "vocab_size": vocab,
        "max_position_embeddings": context,
    } | more


PRESETS = {
    # name: width, heads, layers, MLP, vocabulary                        parameters
    "demo": _shape(192, 6, 4, 768, 2048),  #                               2.6 M  one CPU, minutes
    "phi2-chinese-0.2b": _shape(768, 12, 16, 4096, 35840),  #            193.7 M  as released
    "phi2-chinese-0.35b": _shape(
        960, 16, 24, 4096, 32768
    ),  #           340.4 M  as on the original's main branch
    # The recommended one: head_dim 64 suits every fast kernel (60 does not) and MLP = 4 x width every engine.
    "phi2-chinese-0.35b-fast": _shape(960, 15, 24, 3840, 32768),  #      328.6 M
    "phi-1.5": _shape(2048, 32, 24, 8192, 51200, 2048),  #              1418.3 M
    "phi-2": _shape(
        2560, 32, 32, 10240, 51200, 2048, partial_rotary_factor=0.4, resid_pdrop=0.1
    ),  # 2779.7 M
}
