"""GGUF: weights, tokenizer and chat template in one file, as llama.cpp and Ollama read it.

    python -m nanophi.infer.gguf --model out/demo/dpo --out demo.gguf --type q8_0

The file, from front to back:

    GGUF      version, number of tensors, number of entries
    entries   key, kind of value, value        "phi2.block_count", UINT32, 4
    tensors   name, shape, kind, place         "blk.0.attn_q.weight", 192 x 192, Q8_0, 65536
    data      the numbers of the tensors, at these places; each is a multiple of 32 bytes

How weights are stored (`FORMATS`); vectors, such as biases, stay in fp32:

    f32     4 bytes      as they are
    f16     2 bytes      11 bits of precision, numbers up to 65504
    bf16    2 bytes      8 bits of precision, any number
    q8_0    1.06 bytes   blocks of 32 numbers: a scale in fp16, and 32 whole numbers

        block       0.50  -1.00   0.26  ...      the largest is 1.00
        scale       1.00 / 127 = 0.00787
        stored        64   -127     33  ...      0.504  -1.000  0.260 when they are read

Source: the description of the format, github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from nanophi.cli import Progress, UserError, flag, row_named, run_command
from nanophi.files import refuse_special, replacing, write_text
from nanophi.model.checkpoint import load_with_tokenizer
from nanophi.model.config import PHI, PhiConfig
from nanophi.model.phi import Phi
from nanophi.tokenizer.levels import ByteLevel
from nanophi.tokenizer.template import TEMPLATES, UNKNOWN
from nanophi.tokenizer.tokenizer import Tokenizer

VERSION = 3
ALIGNMENT = 32  # bytes
LARGEST_HALF = 65504.0  # of fp16

# ---- 1. how weights are stored


@dataclass(frozen=True)
class Format:
    """A kind of numbers: `numbers` of them together take `size` bytes."""

    number: int  # of the kind, in the list of tensors
    file_type: int  # of a file whose weights are of this kind
    numbers: int
    size: int
    encode: Callable[[Tensor], bytes]

    def bytes_for(self, weight: Tensor) -> int:
        return weight.numel() // self.numbers * self.size


def raw(weight: Tensor) -> bytes:
    return weight.contiguous().view(torch.uint8).numpy().tobytes()


def as_f16(weight: Tensor) -> bytes:
    if not weight.abs().max() <= LARGEST_HALF:
        raise UserError("some weights are larger than fp16 can hold: take --type bf16")
    return raw(weight.half())


def as_q8_0(weight: Tensor) -> bytes:
    """Blocks of 32 numbers: 2 bytes of scale, 32 bytes of whole numbers."""
    blocks = weight.reshape(-1, 32)
    scales = blocks.abs().amax(1, keepdim=True) / 127
    inverse = torch.where(scales > 0, 1 / scales, 0)  # a block of zeros
    whole = (blocks * inverse).round().to(torch.int8)
    return raw(torch.cat((scales.half().view(torch.int8), whole), 1))


FORMATS = {
    "f32": Format(0, 0, 1, 4, raw),
    "f16": Format(1, 1, 1, 2, as_f16),
    "bf16": Format(30, 32, 1, 2, lambda weight: raw(weight.bfloat16())),
    "q8_0": Format(8, 7, 32, 34, as_q8_0),
}


def format_for(weight: Tensor, chosen: str) -> Format:
    """The format of a tensor: vectors stay exact, and rows that no blocks fill are f16."""
    if weight.ndim == 1:
        return FORMATS["f32"]
    if weight.shape[1] % FORMATS[chosen].numbers:
        return FORMATS["f16"]
    return FORMATS[chosen]


# ---- 2. the entries

# What llama.cpp calls the splits of splits.py.
SPLIT_NAMES = {"gpt2": "gpt-2", "qwen2": "qwen2"}

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # sorts of tokens


def entries_of(cfg: PhiConfig, tok: Tokenizer, chosen: str) -> dict[str, Any]:
    """All that is no tensor. int, float, bool, str and lists of int or str are what it may hold.

    The names after "phi2." are those of llama.cpp. It assumes a context of its own, heads that are
    rotated whole and an MLP of 4 times the width where nothing is said.
    """
    eos = cfg.eos_token_id if isinstance(cfg.eos_token_id, list) else [cfg.eos_token_id]
    entries = {
        "general.architecture": "phi2",
        "general.type": "model",
        "general.name": "nanophi",
        "general.file_type": FORMATS[chosen].file_type,
        "general.quantization_version": 2,
        "phi2.context_length": cfg.max_position_embeddings,
        "phi2.embedding_length": cfg.hidden_size,
        "phi2.feed_forward_length": cfg.intermediate_size,
        "phi2.block_count": cfg.num_hidden_layers,
        "phi2.attention.head_count": cfg.num_attention_heads,
        "phi2.attention.head_count_kv": cfg.key_heads,
        "phi2.attention.layer_norm_epsilon": float(cfg.layer_norm_eps),
        "phi2.rope.dimension_count": cfg.rotary_dim,
        "phi2.rope.freq_base": float(cfg.rope_theta),
        **tokenizer_entries(tok, cfg.vocab_size),
        "tokenizer.ggml.bos_token_id": cfg.bos_token_id,
        "tokenizer.ggml.eos_token_id": eos[0],
        "tokenizer.ggml.padding_token_id": cfg.pad_token_id,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
    }
    if len(eos) > 1:
        entries["tokenizer.ggml.eot_token_id"] = eos[1]
    if "[UNK]" in tok.added:
        entries["tokenizer.ggml.unknown_token_id"] = tok.added["[UNK]"]
    jinja = tok.unknown_jinja if tok.template == UNKNOWN else TEMPLATES[tok.template].jinja
    if isinstance(jinja, str):
        entries["tokenizer.chat_template"] = jinja
    return entries


def tokenizer_entries(tok: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """The tokens, what sort each is, and the merges.

    id      token     sort
    1       [EOS]     CONTROL        a special token
    263     æĦŁ       NORMAL         spelled as in tokenizer.json
    2040    [工具]    USER_DEFINED   an added token
    2047    [PAD2047] UNUSED         a row of the embedding that no token has
    """
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    sorts = [UNUSED] * vocab_size
    for i, spelling in tok.spelling.items():
        tokens[i], sorts[i] = spelling, NORMAL
    for text, i in tok.added.items():
        tokens[i], sorts[i] = text, CONTROL if text in tok.specials else USER_DEFINED
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": split_name(tok),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": sorts,
        "tokenizer.ggml.merges": [
            f"{tok.spelling[left]} {tok.spelling[right]}" for left, right in tok.merge_list
        ],
    }


def split_name(tok: Tokenizer) -> str:
    """The split of a tokenizer by its name in llama.cpp, or a UserError where that has none.

    Characters are not composed there (level.nfc): e and an accent stay two characters.
    """
    if not isinstance(tok.level, ByteLevel):
        raise UserError(
            f"GGUF cannot hold this tokenizer: llama.cpp has nothing like the {tok.level.name} "
            "level; train one with --level byte, and the model with it"
        )
    if tok.level.split not in SPLIT_NAMES:
        raise UserError(
            f"GGUF cannot hold this tokenizer: llama.cpp has no split like {tok.level.split!r}"
        )
    return SPLIT_NAMES[tok.level.split]


# ---- 3. the tensors

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.final_layernorm": "output_norm",
    "lm_head": "output",
}
NAMES_IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.dense": "attn_output",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}


def name_of(name: str) -> str:
    """The name of a tensor in llama.cpp.

    >>> name_of("model.layers.3.mlp.fc1.weight"), name_of("lm_head.bias")
    ('blk.3.ffn_up.weight', 'output.bias')
    """
    module, leaf = name.rsplit(".", 1)
    if module in NAMES:
        return f"{NAMES[module]}.{leaf}"
    _, _, layer, part = module.split(".", 3)
    return f"blk.{layer}.{NAMES_IN_LAYER[part]}.{leaf}"


# ---- 4. the file

UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9  # kinds of values


def packed_text(text: str) -> bytes:
    r"""The length in bytes, and the bytes.

    >>> packed_text("好")
    b'\x03\x00\x00\x00\x00\x00\x00\x00\xe5\xa5\xbd'
    """
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def packed_value(value: Any) -> bytes:
    """The kind of a value, and the value."""
    match value:
        case bool():  # before int, of which it is one in Python
            return struct.pack("<I?", BOOL, value)
        case int():
            return struct.pack("<II", UINT32, value)
        case float():
            return struct.pack("<If", FLOAT32, value)
        case str():
            return struct.pack("<I", STRING) + packed_text(value)
    if all(isinstance(item, int) for item in value):
        return struct.pack(f"<IIQ{len(value)}i", ARRAY, INT32, len(value), *value)
    texts = b"".join(packed_text(item) for item in value)
    return struct.pack("<IIQ", ARRAY, STRING, len(value)) + texts


def padding(size: int) -> int:
    """Bytes up to the next multiple of ALIGNMENT."""
    return -size % ALIGNMENT


def save_gguf(path: str | Path, model: Phi, tok: Tokenizer, kind: str = "f16") -> None:
    """Write a model with its tokenizer as one GGUF file. kind: a name of FORMATS

    A UserError where llama.cpp could not compute the model, or would cut its texts in another way.
    """
    row_named(FORMATS, kind, "type")
    if model.architecture != PHI:
        raise UserError(f"llama.cpp knows no {model.architecture}, only {PHI}")
    if model.cfg.qk_layernorm:
        raise UserError("llama.cpp has no LayerNorm over queries and keys (qk_layernorm)")
    entries = entries_of(model.cfg, tok, kind)
    tensors = {name_of(name): weight for name, weight in model.state_dict().items()}
    with replacing(path) as beside, open(beside, "wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", VERSION, len(tensors), len(entries)))
        for key, value in entries.items():
            file.write(packed_text(key) + packed_value(value))
        place = 0
        for name, weight in tensors.items():
            file.write(packed_text(name))
            # The shape is written from the inside out: that of W (N, K) is K, N.
            file.write(struct.pack(f"<I{weight.ndim}Q", weight.ndim, *reversed(weight.shape)))
            chosen = format_for(weight, kind)
            file.write(struct.pack("<IQ", chosen.number, place))
            size = chosen.bytes_for(weight)
            place += size + padding(size)
        file.write(bytes(padding(file.tell())))
        write_tensors(file, tensors, kind)


def write_tensors(file: IO[bytes], tensors: dict[str, Tensor], kind: str) -> None:
    """The numbers of all tensors, one after the other."""
    with Progress("tensors", len(tensors)) as bar:
        for weight in tensors.values():
            data = format_for(weight, kind).encode(weight.detach().float().cpu())
            file.write(data)
            file.write(bytes(padding(len(data))))
            bar.update()


# ---- 5. Ollama

# The chat templates in Ollama's language, which is not Jinja.
OLLAMA_TEMPLATES = {
    "wenda": (
        '{{- $before := "" }}{{- range .Messages }}'
        '{{- if eq .Role "system" }}{{- $before = printf "%s%s\\n" $before .Content }}'
        '{{- else if eq .Role "user" }}##提问:\n{{ $before }}{{ .Content }}\n##回答:\n'
        '{{ $before = "" }}'
        "{{- else }}{{ .Content }}[EOS]{{ end }}{{ end }}"
    ),
    "chatml": (
        "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}"
        "<|im_start|>assistant\n"
    ),
}


def modelfile(gguf: Path, cfg: PhiConfig, tok: Tokenizer) -> str:
    """What `ollama create` reads: the file, the chat template, and where an answer ends."""
    lines = [f"FROM ./{gguf.name}"]
    if tok.template in OLLAMA_TEMPLATES:
        lines.append(f'TEMPLATE """{OLLAMA_TEMPLATES[tok.template]}"""')
        lines.append(f'PARAMETER stop "{TEMPLATES[tok.template].stop}"')
    lines.append(f"PARAMETER num_ctx {cfg.max_position_embeddings}")
    lines.append("PARAMETER temperature 0")
    return "\n".join(lines) + "\n"


# ---- 6. the command


@dataclass(kw_only=True)
class Config:
    model: str = flag(help="the directory of a model with its tokenizer")
    out: str = flag(help="the file to write, such as model.gguf; a Modelfile for Ollama beside it")
    type: str = flag("f16", choices=FORMATS, help="how the weights are stored")


def main(cfg: Config) -> None:
    out = Path(cfg.out)
    if out.suffix != ".gguf":
        raise UserError(f"--out {cfg.out} is no name of a GGUF file: let it end with .gguf")
    for path in (out, out.with_suffix(".Modelfile")):
        refuse_special(path)
    model, tok = load_with_tokenizer(cfg.model)
    save_gguf(out, model, tok, cfg.type)
    write_text(out.with_suffix(".Modelfile"), modelfile(out, model.cfg, tok))
    print(f"{out}: {out.stat().st_size / 1e6:,.1f} MB, weights as {cfg.type}")
    print(f"llama-server -m {out}")
    print(f"ollama create {out.stem} -f {out.with_suffix('.Modelfile')}")


if __name__ == "__main__":
    run_command(Config, main)
