"""The shape of a Phi model: HF's field names, the presets, and config.json.

FIELDS says what each field may be. A config that is made in Python and one that is read from a file
pass the same table.
"""

from dataclasses import asdict, dataclass
from typing import Any

from nanophi.cli import SHOWN, UserError
from nanophi.expect import Expected, check, check_fields

PHI = "PhiForCausalLM"  # the architecture that transformers and other engines know


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
    """fewer than H: grouped-query attention (Ainslie et al. 2023). None: H; H itself becomes None,
    so that `dataclasses.replace` of H alone keeps one key head for each query head
    """
    max_position_embeddings: int = 512
    """longest context trained on, in tokens"""
    partial_rotary_factor: float = 0.5
    """share of each head's dimensions that is rotated: 0.5 in transformers, 0.4 in microsoft/phi-2
    """
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
        for name, expected in FIELDS.items():
            check(getattr(self, name), expected, name)
        if self.num_key_value_heads == self.num_attention_heads:
            self.num_key_value_heads = None
        self._check_token_ids()
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size {self.hidden_size} is not a multiple of "
                f"{self.num_attention_heads} heads"
            )
        if self.num_attention_heads % self.key_heads:
            raise UserError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.rotary_dim % 2 or self.rotary_dim == 0:
            raise UserError(
                f"partial_rotary_factor {self.partial_rotary_factor} of head_dim {self.head_dim} "
                f"rotates {self.rotary_dim} dimensions; rotation works on pairs: choose a factor "
                "that gives an even number"
            )

    def _check_token_ids(self) -> None:
        """An id that the model does not know would never be produced: no answer would end."""
        known = Expected(int, at_least=0, at_most=self.vocab_size - 1)
        advice = f"vocab_size is {self.vocab_size:,}"
        check(self.pad_token_id, known, "pad_token_id", advice)
        check(self.bos_token_id, known, "bos_token_id", advice)
        if not isinstance(self.eos_token_id, list):
            check(self.eos_token_id, known, "eos_token_id", advice)
        else:
            check(self.eos_token_id, Expected(list, of=known), "eos_token_id", advice)
            if not self.eos_token_id:
                raise UserError("eos_token_id is an empty list: no answer would end")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def key_heads(self) -> int:
        """Heads of keys and values: num_key_value_heads, or H where that is not given."""
        return self.num_key_value_heads or self.num_attention_heads

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "PhiConfig":
        """A named shape, single fields overridden: `PhiConfig.preset("demo", vocab_size=2048)`."""
        if name not in PRESETS:
            raise UserError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
        return cls(**PRESETS[name] | overrides)

    @classmethod
    def from_dict(
        cls, config: dict, architecture: str = PHI, where: str = "config.json"
    ) -> "PhiConfig":
        """Read a config.json: that of HF's model_type "phi", as transformers 4 and 5 write it, or
        that of a changed network, whose name is `architecture`.

        where: the file, for messages. A field that is missing or null has its default, but the
        shape must be there: nobody knows how many heads some weights have.
        """
        check_fields(config, ENTRIES, where, FIX)
        names = config.get("architectures") or []
        if architecture != PHI and architecture not in names:
            raise UserError(
                f"{where} is that of {', '.join(names)[:SHOWN] or 'a model without a name'}; "
                f"this network is a {architecture}"
            )
        if architecture == PHI and config.get("model_type") != "phi":
            found = repr(config.get("model_type"))[:SHOWN]
            raise UserError(f"{where} has model_type {found}; only 'phi' can be loaded")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        check_fields(rope, ROPE_ENTRIES, f"{where}: rope_parameters", FIX)
        rope_type = rope.get("rope_type") or rope.get("type")
        for key, value, expected in (
            ("hidden_act", config.get("hidden_act"), "gelu_new"),
            ("tie_word_embeddings", config.get("tie_word_embeddings"), False),
            ("rope_type", rope_type, "default"),
        ):
            if value is not None and value != expected:
                found = repr(value)[:SHOWN]
                raise UserError(f"{where} has {key} {found}; only {expected!r} is supported")
        fields = dict(config)
        for name in ("rope_theta", "partial_rotary_factor"):
            if rope.get(name) is not None:
                fields[name] = rope[name]
        check_fields(fields, {name: FIELDS[name] for name in SHAPE}, where, FIX)
        known = cls.__dataclass_fields__
        given = {name: fields[name] for name in known if fields.get(name) is not None}
        try:
            return cls(**given)
        except UserError as error:
            raise UserError(f"{where}: {error}; {FIX}") from None

    def to_dict(self, architecture: str = PHI, dtype: str = "float32") -> dict:
        """config.json for transformers 4.57 and 5.x, vLLM and llama.cpp.

        RoPE is written in both forms (5.x reads rope_parameters, 4.x the top-level keys), and the
        width of the MLP also as `n_inner`, because some engines ignore intermediate_size and assume
        4 x hidden_size.

        A network with another name than PhiForCausalLM gets a model_type that no other engine
        knows, so that none loads its weights as Phi's. What it may compute in another way, such as
        the activation, is left out.
        """
        entries = asdict(self) | {
            "num_key_value_heads": self.key_heads,
            "architectures": [architecture],
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
            "torch_dtype": dtype,
        }
        if architecture != PHI:
            entries["model_type"] = f"nanophi-{architecture}"
            for name in ("hidden_act", "n_inner", "rope_parameters"):
                del entries[name]
        return entries


# ---- what the fields may be

FIX = "take the config.json that was written together with the weights"

# What each field may be; the ids of tokens are looked at beside it, as vocab_size limits them. The
# largest numbers are far beyond any model, and still can be checked before a layer is built.
FIELDS = {
    "vocab_size": Expected(int, at_least=1, at_most=2**24),
    "hidden_size": Expected(int, at_least=1, at_most=2**20),
    "intermediate_size": Expected(int, at_least=1, at_most=2**24),
    "num_hidden_layers": Expected(int, at_least=1, at_most=10_000),
    "num_attention_heads": Expected(int, at_least=1, at_most=2**20),
    "num_key_value_heads": Expected(int, at_least=1, at_most=2**20, optional=True),
    "max_position_embeddings": Expected(int, at_least=2, at_most=2**24),
    "partial_rotary_factor": Expected(float, above=0, at_most=1),
    "rope_theta": Expected(float, at_least=1),
    "layer_norm_eps": Expected(float, above=0, at_most=1),
    "qk_layernorm": Expected(bool),
    "embd_pdrop": Expected(float, at_least=0, at_most=1),
    "resid_pdrop": Expected(float, at_least=0, at_most=1),
    "attention_dropout": Expected(float, at_least=0, at_most=1),
    "initializer_range": Expected(float, at_least=0, at_most=1),
}

# The fields that config.json must have.
SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)

# What else is read of config.json, and of its rope_parameters.
ENTRIES = {
    "architectures": Expected(list, of=Expected(str), optional=True),
    "model_type": Expected(str, optional=True),
    "hidden_act": Expected(str, optional=True),
    "tie_word_embeddings": Expected(bool, optional=True),
    "rope_parameters": Expected(dict, optional=True),
    "rope_scaling": Expected(dict, optional=True),
}
ROPE_ENTRIES = {
    "rope_type": Expected(str, optional=True),
    "type": Expected(str, optional=True),
}


# ---- presets


def _shape(
    width: int, heads: int, layers: int, mlp: int, vocab: int, context: int = 512, **more: Any
) -> dict:
    return {
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "intermediate_size": mlp,
        "vocab_size": vocab,
        "max_position_embeddings": context,
    } | more


PRESETS = {
    # 2.6 M parameters: one CPU, minutes
    "demo": _shape(192, heads=6, layers=4, mlp=768, vocab=2048),
    # 193.7 M, as released
    "phi2-chinese-0.2b": _shape(768, heads=12, layers=16, mlp=4096, vocab=35840),
    # 340.4 M, as on the original's main branch
    "phi2-chinese-0.35b": _shape(960, heads=16, layers=24, mlp=4096, vocab=32768),
    # 328.6 M, the recommended one: its head_dim 64 suits every fast kernel (60 does not), and its
    # MLP of 4 x width every engine
    "phi2-chinese-0.35b-fast": _shape(960, heads=15, layers=24, mlp=3840, vocab=32768),
    # 1418.3 M
    "phi-1.5": _shape(2048, heads=32, layers=24, mlp=8192, vocab=51200, context=2048),
    # 2779.7 M
    "phi-2": _shape(
        2560,
        heads=32,
        layers=32,
        mlp=10240,
        vocab=51200,
        context=2048,
        partial_rotary_factor=0.4,
        resid_pdrop=0.1,
    ),
}


def presets() -> dict[str, PhiConfig]:
    """Every preset by its name."""
    return {name: PhiConfig.preset(name) for name in PRESETS}
