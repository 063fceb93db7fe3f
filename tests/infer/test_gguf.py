"""GGUF files: read back by the gguf package, and run by llama.cpp itself."""

import dataclasses
import json
import random
import statistics
import urllib.request

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nanophi.cli import UserError
from nanophi.infer import gguf as ours
from nanophi.infer.generate import generate
from nanophi.infer.gguf import FORMATS, modelfile, save_gguf
from nanophi.model.checkpoint import save
from nanophi.tokenizer.bpe import train_bpe
from nanophi.tokenizer.chat import chat_prompt
from nanophi.tokenizer.template import TEMPLATES
from tests.conftest import TEXTS, tiny_config, tiny_model

gguf = pytest.importorskip("gguf", reason="the gguf package is an extra of the tests")

MESSAGES = [
    {"role": "system", "content": "你是医生。"},
    {"role": "user", "content": "在吗"},
    {"role": "assistant", "content": " 在 "},
    {"role": "user", "content": "谢谢"},
]


def chat_model(tok, spread=0.05, **changes):
    """A model with the tokenizer's vocabulary and some rows to spare."""
    model = tiny_model(spread=spread, **changes)
    model.set_vocabulary(len(tok))
    return model


def read(path) -> tuple[dict, dict]:
    """The entries and the tensors of a file, as the gguf package reads them."""
    reader = gguf.GGUFReader(path)
    entries = {
        key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")
    }
    return entries, {tensor.name: tensor for tensor in reader.tensors}


# ---- the file


def test_every_entry_reads_back(tok, tmp_path):
    model = chat_model(tok, num_key_value_heads=2, rope_theta=5e4, partial_rotary_factor=0.25)
    save_gguf(tmp_path / "m.gguf", model, tok)
    entries, tensors = read(tmp_path / "m.gguf")
    expected = ours.entries_of(model.cfg, tok, "f16")
    assert entries.keys() == expected.keys()
    for key, value in expected.items():
        found = entries[key]
        if isinstance(value, float):
            assert found == pytest.approx(value, rel=1e-6), key
        else:
            assert found == value, key
    assert len(entries["tokenizer.ggml.tokens"]) == model.cfg.vocab_size
    assert entries["phi2.feed_forward_length"] == 64  # and not 4 x width
    assert tensors["blk.1.attn_k.weight"].shape.tolist() == [32, 16]


@pytest.mark.parametrize("kind", FORMATS)
def test_every_tensor_reads_back(tok, tmp_path, kind):
    model = chat_model(tok)
    save_gguf(tmp_path / "m.gguf", model, tok, kind)
    _, tensors = read(tmp_path / "m.gguf")
    state = {ours.name_of(name): weight for name, weight in model.state_dict().items()}
    assert tensors.keys() == state.keys()
    for name, weight in state.items():
        found = tensors[name]
        assert found.data_offset % 32 == 0
        assert list(reversed(found.shape.tolist())) == list(weight.shape)
        numbers = torch.tensor(gguf.quants.dequantize(found.data, found.tensor_type))
        if weight.ndim == 1 or kind == "f32":
            assert torch.equal(numbers, weight), name
        elif kind == "q8_0":
            encoded = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q8_0)
            assert np.array_equal(found.data, encoded), name
            largest = weight.reshape(-1, 32).abs().amax(1).repeat_interleave(32)
            bound = largest.view(weight.shape) / 254 * 1.1  # half a step, and the scale in fp16
            assert ((numbers - weight).abs() <= bound).all(), name
        else:
            dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[kind]
            assert torch.equal(numbers, weight.to(dtype).float()), name


def test_rows_that_no_blocks_fill_are_fp16(tok, tmp_path):
    """A width of 48 is one block of 32 and a half: q8_0 cannot hold such rows."""
    model = chat_model(tok, hidden_size=48)
    save_gguf(tmp_path / "m.gguf", model, tok, "q8_0")
    _, tensors = read(tmp_path / "m.gguf")
    assert tensors["token_embd.weight"].tensor_type.name == "F16"
    assert tensors["blk.0.ffn_down.weight"].tensor_type.name == "Q8_0"


def test_a_block_of_zeros_stays_zeros():
    assert ours.as_q8_0(torch.zeros(1, 32)) == bytes(34)


# ---- llama.cpp


class LlamaCpp:
    """llama.cpp's server, in this process."""

    def __init__(self, path, context=64):
        xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp's wheel is not installed")
        given = xllamacpp.CommonParams()
        given.model.path = str(path)
        given.n_ctx = context
        given.n_parallel = 1
        given.cpuparams.n_threads = 1
        given.cpuparams_batch.n_threads = 1
        given.warmup = False
        given.use_jinja = True
        given.port = 0
        given.verbosity = 0
        # In its usual state attention works in fp16.
        given.cache_type_k = given.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        given.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(given)

    def post(self, path, **body):
        request = urllib.request.Request(
            self.server.listening_address + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    def tokenize(self, text):
        return self.post("/tokenize", content=text, add_special=False, parse_special=False)[
            "tokens"
        ]

    def logprobs(self, ids, best=50):
        """{id: ln p} of the likeliest ids behind a prompt."""
        given = self.post("/completion", prompt=ids, n_predict=1, temperature=0, n_probs=best)
        (first,) = given["completion_probabilities"]
        return {row["id"]: row["logprob"] for row in first["top_logprobs"]}


def largest_differences(engine, model, tok, count=5) -> list[float]:
    """Of ln p of the likeliest tokens, behind some prompts.

    llama.cpp tells no probabilities where an answer ends, or a character is only half said.
    """
    found = []
    for text in mixed_texts(1000):
        ids = tok.encode(text)[:40]
        with torch.inference_mode():
            logprobs = model(torch.tensor([ids]))[0, -1].log_softmax(-1)
        next_id = int(logprobs.argmax())
        if next_id == tok.eos_id or "\ufffd" in tok.decode([next_id]):
            continue
        given = engine.logprobs(ids)
        found.append(max(abs(p - logprobs[i].item()) for i, p in given.items()))
        if len(found) == count:
            break
    return found


GELU = F.gelu


def gelu_of_ggml(x, approximate):
    """ggml looks GELU up in a table: for each number of fp16, its GELU in fp16. Beyond 10 and -10
    it takes x and 0.
    """
    rounded = GELU(x.half().float(), approximate=approximate).half().float()
    return torch.where(x.abs() < 10, rounded, x.relu())


@pytest.fixture(scope="module")
def engine_of(tmp_path_factory):
    """Engines by model, each started once."""

    def start(model, tok, kind="f32"):
        path = tmp_path_factory.mktemp("gguf") / "m.gguf"
        save_gguf(path, model, tok, kind)
        return LlamaCpp(path, model.cfg.max_position_embeddings)

    return start


def mixed_texts(count: int) -> list[str]:
    dice = random.Random(0)
    pool = "".join(TEXTS) + " \n\t'\"　，。！？０１２abcXYZ😀éÅ한국アイ's 'LL\r\n"
    texts = ["".join(dice.choices(pool, k=dice.randint(1, 40))) for _ in range(count // 2)]
    ranges = [(32, 0x2FFF), (0x3000, 0xD7FF), (0x10000, 0x2FFFF)]
    for _ in range(count - len(texts)):
        codes = [dice.randint(*dice.choice(ranges)) for _ in range(12)]
        texts.append("".join(map(chr, codes)))
    return texts


@pytest.mark.parametrize("split", ours.SPLIT_NAMES)
def test_llama_cpp_cuts_texts_alike(engine_of, split):
    tok = train_bpe(TEXTS, vocab_size=400, split=split)
    tok.add_tokens(["[工具]"])
    engine = engine_of(chat_model(tok), tok)
    for text in ["你[EOS]好", "用[工具]吧", *mixed_texts(1000)]:
        assert engine.tokenize(text) == tok.encode(text), text


@pytest.mark.parametrize("template", TEMPLATES)
def test_llama_cpp_fills_the_template_alike(engine_of, template):
    tok = train_bpe(TEXTS, vocab_size=400)
    tok.add_tokens(list(TEMPLATES[template].specials), special=True)
    tok.template = template
    engine = engine_of(chat_model(tok), tok)
    text = engine.post("/apply-template", messages=MESSAGES)["prompt"]
    assert tok.encode(text, specials=True) == chat_prompt(MESSAGES, tok)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hidden_size": 240, "num_attention_heads": 4, "partial_rotary_factor": 0.4},  # head_dim 60
        {"num_key_value_heads": 2, "intermediate_size": 96, "rope_theta": 5e4},
    ],
    ids=["plain", "head_dim 60", "grouped, mlp 3 D, theta"],
)
def test_llama_cpp_computes_alike(engine_of, tok, changes):
    model = chat_model(tok, **changes)
    engine = engine_of(model, tok)
    differences = largest_differences(engine, model, tok)
    assert len(differences) == 5
    assert max(differences) < 2e-3


def test_what_llama_cpp_computes_otherwise_is_gelu(engine_of, tok, monkeypatch):
    """It rounds the input and the output of GELU to fp16. With large activations that alone takes
    ln p beyond the bar of the test above. Of 20 prompts the largest and the median difference:

        our GELU                  3.7e-3   2.1e-3
        rounded as there          5e-5     7e-6    only the order of sums is left
        its input alone rounded   2.4e-3   1.3e-3
        rounded beyond 10 too     2.0e-3   1.9e-4

    The median is held to a fiftieth. The largest is not: a number halfway between two of fp16 may
    go to the other one where sums have another order, in one prompt or two.
    """
    model = chat_model(tok, spread=0.5)  # activations up to 15
    engine = engine_of(model, tok)
    exact = largest_differences(engine, model, tok, 20)
    monkeypatch.setattr(F, "gelu", gelu_of_ggml)
    rounded = largest_differences(engine, model, tok, 20)
    assert len(exact) == len(rounded) == 20
    assert max(exact) > 2e-3
    assert statistics.median(rounded) < statistics.median(exact) / 50


def test_llama_cpp_answers_alike(engine_of, tok):
    model = chat_model(tok)
    engine = engine_of(model, tok)
    prompts = [chat_prompt(text[:8], tok)[-40:] for text in TEXTS[:5]]
    for ids in prompts:
        given = engine.post(
            "/completion", prompt=ids, n_predict=12, temperature=0, return_tokens=True
        )
        answer = generate(model, ids, 12)
        assert given["tokens"] == [i for i in answer if i != tok.eos_id]


# ---- Ollama


def test_the_modelfile_names_the_file_the_template_and_the_end(tok, tmp_path):
    text = modelfile(tmp_path / "m.gguf", tiny_config(), tok)
    assert text.startswith("FROM ./m.gguf\n")
    assert "##提问:\n" in text
    assert 'PARAMETER stop "[EOS]"' in text
    assert "PARAMETER num_ctx 64" in text


def test_every_template_has_one_for_ollama():
    assert ours.OLLAMA_TEMPLATES.keys() == TEMPLATES.keys()


# ---- the command and its mistakes


def test_the_command_writes_both_files(tok, tmp_path, capsys):
    save(tmp_path / "model", chat_model(tok), tok)
    ours.main(ours.Config(model=str(tmp_path / "model"), out=str(tmp_path / "a.gguf"), type="q8_0"))
    entries, _ = read(tmp_path / "a.gguf")
    assert entries["general.file_type"] == 7
    assert (tmp_path / "a.Modelfile").exists()
    assert "llama-server -m" in capsys.readouterr().out


def test_a_name_that_is_no_gguf_is_refused_before_the_model_is_read(tmp_path):
    """`--out out/demo/dpo/model.safetensors` would have replaced the model."""
    with pytest.raises(UserError, match=r"end with \.gguf"):
        ours.main(ours.Config(model="nowhere", out=str(tmp_path / "model.safetensors")))


def test_what_llama_cpp_cannot_compute_is_refused(tok, tmp_path):
    with pytest.raises(UserError, match="qk_layernorm"):
        save_gguf(tmp_path / "m.gguf", tiny_model(qk_layernorm=True), tok)
    model = tiny_model()
    model.architecture = "MyPhi"
    with pytest.raises(UserError, match="MyPhi"):
        save_gguf(tmp_path / "m.gguf", model, tok)
    assert not list(tmp_path.iterdir())


def test_what_gguf_cannot_cut_is_named(tmp_path):
    tok = train_bpe(TEXTS, vocab_size=400, level="char")
    with pytest.raises(UserError, match="char level"):
        save_gguf(tmp_path / "m.gguf", tiny_model(), tok)
    tok = train_bpe(TEXTS, vocab_size=400)
    tok.level = dataclasses.replace(tok.level, split="by line")
    with pytest.raises(UserError, match="by line"):
        save_gguf(tmp_path / "m.gguf", tiny_model(), tok)


def test_weights_beyond_fp16_are_refused(tok, tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e6
    with pytest.raises(UserError, match="bf16"):
        save_gguf(tmp_path / "m.gguf", model, tok, "f16")
    save_gguf(tmp_path / "m.gguf", model, tok, "bf16")
