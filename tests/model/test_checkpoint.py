"""A checkpoint directory is read by transformers, and its directories are read here."""

import dataclasses
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PhiForCausalLM
from transformers import PhiConfig as HFConfig

import nanophi
from nanophi.cli import UserError
from nanophi.model import attention, checkpoint
from nanophi.model.checkpoint import (
    PROBE,
    PROBE_LOGITS,
    WEIGHTS,
    WEIGHTS_INDEX,
    check_architecture,
    load_with_tokenizer,
    pick_device,
)
from tests.conftest import tiny_model
from tests.test_fuzz import mutated_header, mutated_json

IDS = torch.arange(5, 45).view(2, 20)


def test_auto_model_reads_ours(tok, tmp_path):
    model = tiny_model()
    nanophi.save(tmp_path, model, tok)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(hf, PhiForCausalLM)
    assert (hf(IDS).logits - model(IDS)).abs().max() < 1e-5
    assert hf.config.n_inner == model.cfg.intermediate_size
    assert hf.generation_config.eos_token_id == 1
    again, again_tok = nanophi.load(tmp_path)
    assert torch.equal(again(IDS), model(IDS))
    assert again.cfg == model.cfg
    assert again_tok.fingerprint == tok.fingerprint


@pytest.mark.parametrize("shard_size", ["5GB", "60KB"])
def test_we_read_what_transformers_saves(tmp_path, shard_size):
    cfg = HFConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, rope_parameters={
            "rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.25
        },
    )  # fmt: skip
    hf = PhiForCausalLM(cfg).eval()
    hf.save_pretrained(tmp_path, max_shard_size=shard_size)
    model, tok = nanophi.load(tmp_path)
    assert tok is None
    assert model.cfg.rope_theta == 5000.0
    assert (hf(IDS).logits - model(IDS)).abs().max() < 1e-5


def test_legacy_rope_keys_are_read(tmp_path):
    """transformers 4 wrote rope_theta and partial_rotary_factor at the top level, and null for
    rope_scaling.
    """
    model = tiny_model(partial_rotary_factor=0.25)
    nanophi.save(tmp_path, model)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_scaling": None}))
    assert nanophi.load(tmp_path)[0].cfg == model.cfg


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings True"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": None},
            "rope_type 'linear'",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None},
            "rope_type 'linear'",
        ),
        ({"hidden_size": 64}, "does not fit its config.json"),
        ({"num_hidden_layers": 1}, "does not fit its config.json"),
    ],
)
def test_what_we_cannot_load_is_refused(tmp_path, changes, message):
    nanophi.save(tmp_path, tiny_model())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=message):
        nanophi.load(tmp_path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match="no model in"):
        nanophi.load(tmp_path)
    nanophi.save(tmp_path, tiny_model())
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        nanophi.load(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=r"model\.safetensors is missing"):
        nanophi.load(tmp_path)


def test_saving_over_a_split_model_leaves_no_index_of_it(tmp_path):
    """The old index was read first, and with it the old weights."""
    hf = PhiForCausalLM(HFConfig(**tiny_model().cfg.to_dict()))
    hf.save_pretrained(tmp_path, max_shard_size="60KB")
    model = tiny_model(seed=3)
    nanophi.save(tmp_path, model)
    assert torch.equal(nanophi.load(tmp_path)[0](IDS), model(IDS))


@pytest.mark.parametrize("name", ["foo", "cuda:99", "meta", "mps", "xla", "hpu", "", "x" * 1000])
def test_unknown_devices_are_named_in_one_short_line(name):
    """torch's reason for "mps" has 1,500 characters in many lines; "meta" was taken as a device."""
    with pytest.raises(UserError) as error:
        pick_device(name)
    message = str(error.value)
    assert message.startswith(f"--device {name[:40]} cannot be used here")
    assert len(message) <= 200
    assert "\n" not in message


def test_the_same_weights_are_the_same_bytes(tmp_path):
    """With several metadata keys, the files of one model differed from process to process."""
    for name in ("a", "b"):
        nanophi.save(tmp_path / name, tiny_model())
    assert (tmp_path / "a/model.safetensors").read_bytes() == (
        tmp_path / "b/model.safetensors"
    ).read_bytes()


def test_the_probe_is_what_transformers_answers():
    """The numbers by which a changed network is recognised come from transformers, not from us."""
    hf = PhiForCausalLM(HFConfig(**PROBE.to_dict(), attn_implementation="eager")).eval()
    with torch.no_grad():
        for number, (_, p) in enumerate(sorted(hf.named_parameters())):
            wave = (torch.arange(p.numel()) * 0.7 + number).sin() * 0.5
            p.copy_(wave.view(p.shape))
        logits = hf(torch.arange(48)[None] % 7).logits[0, -1]
    assert torch.allclose(logits, torch.tensor(PROBE_LOGITS), atol=2e-5)


CHANGES = {
    "rotation by another base": ("rope_theta", 20_000.0),
    "another share of rotation": ("partial_rotary_factor", 1.0),
    "no grouped queries": ("num_key_value_heads", 4),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_the_probe_sees_small_changes(change, monkeypatch):
    """A first probe of five tokens and one frequency saw neither another base nor a window."""
    name, value = change
    monkeypatch.setattr(checkpoint, "PROBE", dataclasses.replace(checkpoint.PROBE, **{name: value}))
    with pytest.raises(UserError, match="does not compute what PhiForCausalLM computes"):
        check_architecture(tiny_model())


def test_the_probe_sees_a_window(monkeypatch):
    whole = attention.attention_weights

    def within_32(q, k, visible):
        near = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(-31)
        return whole(q, k, visible & near)

    monkeypatch.setattr(attention, "attention_weights", within_32)
    with pytest.raises(UserError, match="does not compute what PhiForCausalLM computes"):
        check_architecture(tiny_model())


# ---- files that are damaged, or from elsewhere


def split(directory, model=None):
    """A model in two files with an index."""
    state = (model or tiny_model()).state_dict()
    nanophi.save(directory, model or tiny_model())
    (directory / WEIGHTS).unlink()
    names = sorted(state)
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, part in parts.items():
        save_file({name: state[name] for name in part}, directory / file)
    write_index(directory, {name: file for file, part in parts.items() for name in part})


def write_index(directory, weight_map):
    (directory / WEIGHTS_INDEX).write_text(json.dumps({"weight_map": weight_map}))


def refusal(directory, match):
    with pytest.raises(UserError, match=match) as error:
        nanophi.load(directory)
    assert len(str(error.value)) < 600


JSON = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'"x"',
    b"5",
    b"\xff",
    b"[" * 100_000,
    b'{"a": ' + b"9" * 5000 + b"}",
]


@pytest.mark.parametrize("raw", JSON, ids=lambda raw: repr(raw[:9]))
def test_json_of_any_other_form_is_refused(raw, tmp_path):
    """`[]` in config.json was an AttributeError, and deep brackets a RecursionError."""
    split(tmp_path)
    index = (tmp_path / WEIGHTS_INDEX).read_bytes()
    (tmp_path / WEIGHTS_INDEX).write_bytes(raw)
    refusal(tmp_path, WEIGHTS_INDEX)
    (tmp_path / WEIGHTS_INDEX).write_bytes(index)
    assert nanophi.load(tmp_path)
    (tmp_path / "config.json").write_bytes(raw)
    refusal(tmp_path, r"config\.json")


def test_a_million_layers_are_refused_before_they_are_built(tmp_path):
    """Ten thousand layers can be built, in a minute; the file has tensors for two."""
    nanophi.save(tmp_path, tiny_model())
    config = json.loads((tmp_path / "config.json").read_text())
    for layers, message in (
        (10**6, "num_hidden_layers is 1000000"),
        (10_000, "too few for 10,000"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
        refusal(tmp_path, message)


OUTSIDE = [
    *(
        "../outside.safetensors",
        "{root}/outside.safetensors",
        "",
        ".",
        "..",
        "/",
        "x/../a.safetensors",
    ),
    *("./a.safetensors", "sub", "none.safetensors", "a" * 10_000, "a\0", "\ud83d", "..\\x"),
]


@pytest.mark.parametrize("name", OUTSIDE, ids=lambda name: name[:20].encode("unicode-escape"))
def test_an_index_names_files_of_its_directory_only(name, tmp_path):
    """weight_map {"x": "../outside.safetensors"} was followed out of the directory."""
    directory = tmp_path / "model"
    split(directory)
    (directory / "sub").mkdir()
    load_file(directory / "a.safetensors")
    (tmp_path / "outside.safetensors").write_bytes((directory / "a.safetensors").read_bytes())
    fields = json.loads((directory / WEIGHTS_INDEX).read_text())["weight_map"]
    first = min(fields)
    write_index(directory, fields | {first: name.format(root=tmp_path)})
    refusal(directory, "weight_map names .*, which is no file in")


@pytest.mark.parametrize(
    "weight_map", [None, [], "x", {}, {"a": 5}, {"a": ["x"]}, {"a": None}, {"a": {}}], ids=repr
)
def test_a_weight_map_of_another_form_is_refused(weight_map, tmp_path):
    split(tmp_path)
    write_index(tmp_path, weight_map)
    refusal(tmp_path, f"{WEIGHTS_INDEX}: weight_map")


def test_a_tensor_that_two_files_have_is_refused(tmp_path):
    split(tmp_path)
    b = load_file(tmp_path / "b.safetensors")
    name, tensor = next(iter(load_file(tmp_path / "a.safetensors").items()))
    save_file(b | {name: tensor}, tmp_path / "b.safetensors")
    refusal(tmp_path, f"{name} is in another file of the model too")


def test_links_within_a_checkpoint_are_followed(tmp_path):
    """The cache of huggingface_hub is made of links."""
    model = tiny_model()
    split(tmp_path / "model", model)
    (tmp_path / "blob").write_bytes((tmp_path / "model/a.safetensors").read_bytes())
    (tmp_path / "model/a.safetensors").unlink()
    (tmp_path / "model/a.safetensors").symlink_to("../blob")
    assert torch.equal(nanophi.load(tmp_path / "model")[0](IDS), model(IDS))


def test_weights_that_are_not_finite_are_named(tmp_path):
    """One nan in lm_head.bias made greedy answers of [MASK] alone, with exit code 0."""
    for wrong in (float("nan"), float("inf"), -float("inf")):
        model = tiny_model()
        with torch.no_grad():
            model.lm_head.bias[5:7] = wrong
        nanophi.save(tmp_path, model)
        refusal(tmp_path, r"model\.safetensors: 2 of 448 numbers of lm_head\.bias are not finite")


def test_doubles_that_exceed_fp32_are_not_finite(tmp_path):
    nanophi.save(tmp_path, tiny_model())
    weights = load_file(tmp_path / WEIGHTS)
    weights["lm_head.bias"] = torch.full((448,), 1e300, dtype=torch.float64)
    save_file(weights, tmp_path / WEIGHTS)
    refusal(tmp_path, "448 of 448 numbers of lm_head")


@pytest.mark.parametrize("dtype", ["int64", "uint8", "bool", "float8_e4m3fn", "complex64"])
def test_weights_of_other_types_are_refused(dtype, tmp_path):
    """Whole numbers were read as weights, and float8 without the scales that belong to it."""
    nanophi.save(tmp_path, tiny_model())
    weights = load_file(tmp_path / WEIGHTS)
    weights["lm_head.bias"] = weights["lm_head.bias"].to(getattr(torch, dtype))
    save_file(weights, tmp_path / WEIGHTS)
    refusal(tmp_path, "lm_head.bias is of type .*, expected one of F64, F32, F16, BF16")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_of_other_widths_are_read(dtype, tmp_path):
    nanophi.save(tmp_path, tiny_model())
    halves = {name: tensor.to(dtype) for name, tensor in load_file(tmp_path / WEIGHTS).items()}
    save_file(halves, tmp_path / WEIGHTS)
    assert {p.dtype for p in nanophi.load(tmp_path)[0].parameters()} == {torch.float32}


# ---- the checksum


def test_any_bit_that_flips_is_found(tmp_path):
    """Every bit of the header, and some of the data. A flip in the checksum's own name is one."""
    small = {"hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 2, "vocab_size": 8}
    nanophi.save(tmp_path, tiny_model(**small, partial_rotary_factor=1.0))
    path = tmp_path / WEIGHTS
    whole = path.read_bytes()
    data = 8 + int.from_bytes(whole[:8], "little")
    bits = [*range(64), *range(64, 8 * data, 11), *range(8 * data, 8 * len(whole), 997)]
    mark = 8 * whole.index(b'"crc32":"crc32:')
    bits += range(mark, mark + 8 * len('"crc32":"crc32:00000000"'))
    for bit in bits:
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(UserError, match="damaged"):
            nanophi.load(tmp_path)
    path.write_bytes(whole)
    assert nanophi.load(tmp_path)


def test_the_checksum_leaves_the_format_as_it_is(tmp_path):
    nanophi.save(tmp_path, tiny_model())
    raw = (tmp_path / WEIGHTS).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0
    assert list(header["__metadata__"]) == ["crc32", "format"]
    with safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        assert file.metadata()["format"] == "pt"
    for name, tensor in load_file(tmp_path / WEIGHTS).items():
        assert torch.equal(tensor, tiny_model().state_dict()[name])


def test_files_of_other_programs_have_no_checksum_and_raise_no_alarm(tmp_path):
    model = tiny_model()
    nanophi.save(tmp_path / "ours", model)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        hf.lm_head.bias += 1
        model.lm_head.bias += 1
    hf.save_pretrained(tmp_path / "theirs")
    again, _ = nanophi.load(tmp_path / "theirs")
    assert torch.equal(again(IDS), model(IDS))


@pytest.mark.parametrize("name", ["config.json", WEIGHTS_INDEX, WEIGHTS])
def test_a_mutated_file_is_read_or_refused(name, tmp_path):
    """A part of tests/test_fuzz.py that needs no command."""
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 8, "vocab_size": 64}
    model = tiny_model(**shape)
    if name == WEIGHTS_INDEX:
        split(tmp_path, model)
    else:
        nanophi.save(tmp_path, model)
    whole = (tmp_path / name).read_bytes()
    mutate = mutated_header if name == WEIGHTS else mutated_json
    messages = []
    for seed in range(200):
        (tmp_path / name).write_bytes(mutate(whole, random.Random(seed)))
        try:
            nanophi.load(tmp_path)
        except UserError as error:
            messages.append(str(error))
    assert len(messages) > 50
    assert "\n" not in "".join(messages)


# ---- several files that belong together


def test_a_save_that_fails_leaves_the_model_that_was_there(tok, tmp_path, monkeypatch):
    """config.json was written before the weights: a full disk left a new shape with old weights."""
    model = tiny_model()
    nanophi.save(tmp_path, model, tok)

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        nanophi.save(tmp_path, tiny_model(hidden_size=64), tok)
    assert torch.equal(nanophi.load(tmp_path)[0](IDS), model(IDS))
    assert not list(tmp_path.glob("*.tmp"))


def test_loading_completes_a_save_that_was_killed(tmp_path):
    nanophi.save(tmp_path, tiny_model(hidden_size=64))
    other = tmp_path / "other"
    nanophi.save(other, tiny_model(seed=3))
    names = ["config.json", WEIGHTS]
    for name in names:
        (other / name).rename(tmp_path / f"{name}.1-1.tmp")
    renames = [[f"{name}.1-1.tmp", name] for name in names]
    plan = {"renames": renames, "deletions": []}
    (tmp_path / "ready.tmp").write_text(json.dumps(plan))
    assert torch.equal(nanophi.load(tmp_path)[0](IDS), tiny_model(seed=3)(IDS))


def test_a_tokenizer_of_another_model_is_refused(tok, tmp_path):
    """A tokenizer with fewer tokens than the model has rows passed, and ids meant other tokens."""
    model = tiny_model()
    model.set_vocabulary(len(tok))
    nanophi.save(tmp_path, model, tok)
    assert load_with_tokenizer(tmp_path)
    model.set_vocabulary(len(tok) + 10)
    nanophi.save(tmp_path, model, tok)
    with pytest.raises(UserError, match=r"they do not belong together .*set_vocabulary"):
        load_with_tokenizer(tmp_path)
    with torch.no_grad():
        model.lm_head.bias.zero_()  # as in models from elsewhere, whose spare rows say nothing
    nanophi.save(tmp_path, model, tok)
    assert load_with_tokenizer(tmp_path)


# ---- dtypes, and models in several files


@pytest.mark.parametrize("dtype", checkpoint.DTYPES)
@pytest.mark.parametrize("limit", [None, 20_000])
def test_a_model_goes_to_transformers_and_back(tmp_path, dtype, limit):
    """In any dtype, whole or in parts: the same bytes of each tensor."""
    model = tiny_model()
    nanophi.save(tmp_path / "ours", model, dtype=dtype, max_shard_bytes=limit)
    kind = checkpoint.DTYPES[dtype]
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert hf.dtype == kind
    hf.save_pretrained(tmp_path / "theirs", max_shard_size="20KB" if limit else "5GB")
    again, _ = nanophi.load(tmp_path / "theirs", dtype=None)
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight.to(kind)), name
    assert (hf.float()(IDS).logits - again.float()(IDS)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("device", "capability", "expected"),
    [
        ("cpu", (9, 0), "float32"),
        ("cuda", (9, 0), "bfloat16"),
        ("cuda:1", (8, 0), "bfloat16"),
        ("cuda", (7, 5), "float32"),
    ],
)
def test_weights_that_are_only_read(device, capability, expected, monkeypatch):
    """On a GPU they were fp32, which takes twice the time and the memory."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert checkpoint.pick_dtype(device) == expected


def test_dtypes_by_name(tmp_path, monkeypatch):
    nanophi.save(tmp_path, tiny_model())
    for name, kind in (*checkpoint.DTYPES.items(), ("auto", torch.float32), (None, torch.float32)):
        assert nanophi.load(tmp_path, dtype=name)[0].lm_head.weight.dtype == kind
    monkeypatch.setattr(checkpoint, "pick_dtype", lambda device: "bfloat16")
    assert nanophi.load(tmp_path, dtype="auto")[0].lm_head.weight.dtype == torch.bfloat16
    with pytest.raises(UserError, match="no dtype is called 'fp8'"):
        nanophi.load(tmp_path, dtype="fp8")


def test_files_are_as_large_as_allowed(tmp_path):
    nanophi.save(tmp_path, tiny_model(), max_shard_bytes=20_000)
    paths = sorted(tmp_path.glob(checkpoint.PARTS))
    assert len(paths) > 3
    sizes = {path.name: sum(t.nbytes for t in load_file(path).values()) for path in paths}
    largest_tensor = max(p.nbytes for p in tiny_model().parameters())
    assert max(sizes.values()) <= max(20_000, largest_tensor)
    index = json.loads((tmp_path / WEIGHTS_INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert not (tmp_path / WEIGHTS).exists()


def test_what_a_model_no_longer_needs_goes_with_it(tmp_path):
    """Files of a split model stayed beside the new one, unread and as large."""
    nanophi.save(tmp_path, tiny_model(), max_shard_bytes=20_000)
    nanophi.save(tmp_path, tiny_model(seed=1), max_shard_bytes=40_000)
    assert torch.equal(nanophi.load(tmp_path)[0](IDS), tiny_model(seed=1)(IDS))
    count = len(list(tmp_path.glob(checkpoint.PARTS)))
    assert all(
        path.name.endswith(f"-of-{count:05}.safetensors") for path in tmp_path.glob("*-of-*")
    )
    nanophi.save(tmp_path, tiny_model(seed=2))
    assert not list(tmp_path.glob(checkpoint.PARTS))
    assert torch.equal(nanophi.load(tmp_path)[0](IDS), tiny_model(seed=2)(IDS))


def test_logits_in_bf16_are_near_those_in_fp32(tmp_path):
    model = tiny_model()
    nanophi.save(tmp_path, model, dtype="bfloat16")
    again, _ = nanophi.load(tmp_path, dtype="bfloat16")
    assert again.device.type == "cpu"
    assert again.lm_head.weight.dtype == torch.bfloat16
    assert (again(IDS).float() - model(IDS)).abs().max() < 0.15
    assert nanophi.generate(again, [5, 6, 7], 4)


@pytest.mark.parametrize("dtype", ["float8", "int8", 16])
def test_unknown_dtypes_are_named(tmp_path, dtype):
    nanophi.save(tmp_path, tiny_model())
    with pytest.raises(UserError, match="float32"):
        nanophi.load(tmp_path, dtype=dtype)
    with pytest.raises(UserError, match="float32"):
        nanophi.save(tmp_path / "other", tiny_model(), dtype=dtype)


def test_numbers_beyond_a_dtype_are_refused_and_nothing_is_lost(tmp_path):
    nanophi.save(tmp_path, tiny_model())
    model = tiny_model(seed=1)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e5
    with pytest.raises(UserError, match=r"lm_head\.weight .* float16"):
        nanophi.save(tmp_path, model, dtype="float16")
    assert torch.equal(nanophi.load(tmp_path)[0](IDS), tiny_model()(IDS))


def test_tensors_that_share_bytes_are_refused(tmp_path):
    """A header whose tensors overlap could show a small file as a large model."""
    nanophi.save(tmp_path, tiny_model())
    path = tmp_path / WEIGHTS
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    names = [name for name in header if name.endswith("layernorm.bias")]
    for name in names:
        header[name]["data_offsets"] = header[names[0]]["data_offsets"]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(UserError, match="damaged"):
        nanophi.load(tmp_path)


MEASURE = """
import sys, nanophi
def peak():
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
nanophi.load(sys.argv[1])  # a tiny model: modules are imported that take memory themselves
before = peak()
model, _ = nanophi.load(sys.argv[2], dtype="bfloat16")
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured on Linux")
def test_a_model_is_loaded_where_its_file_lies(tmp_path):
    """200 MB in bf16: at most 1.2 times that in memory, as the file is mapped."""
    model = tiny_model(hidden_size=1024, intermediate_size=4096, num_hidden_layers=8)
    nanophi.save(tmp_path / "large", model, dtype="bfloat16")
    nanophi.save(tmp_path / "tiny", tiny_model(), dtype="bfloat16")
    size = (tmp_path / "large" / WEIGHTS).stat().st_size
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "tiny"), str(tmp_path / "large")]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 1.2 * size


@pytest.mark.parametrize("preset", sorted(nanophi.presets()))
def test_other_engines_derive_the_shapes_from_config_alone(preset, tmp_path):
    """As vLLM's phi.py does: head_dim is D / H, the MLP is n_inner, or 4 D without it."""
    cfg = nanophi.PhiConfig.preset(preset)
    config = cfg.to_dict()
    width, heads = config["hidden_size"], config["num_attention_heads"]
    mlp = config.get("n_inner") or 4 * width
    assert config["num_key_value_heads"] == heads
    assert config["rope_parameters"]["partial_rotary_factor"] * (width // heads) == cfg.rotary_dim
    in_layer = {
        **{f"self_attn.{part}": (width, width) for part in ("q_proj", "k_proj", "v_proj", "dense")},
        "mlp.fc1": (mlp, width),
        "mlp.fc2": (width, mlp),
        "input_layernorm": (width,),
    }
    derived = {
        f"model.layers.{n}.{part}.weight": shape
        for n in range(config["num_hidden_layers"])
        for part, shape in in_layer.items()
    }
    derived["model.embed_tokens.weight"] = (config["vocab_size"], width)
    derived["lm_head.weight"] = (config["vocab_size"], width)
    derived["model.final_layernorm.weight"] = (width,)
    derived |= {
        name.replace("weight", "bias"): shape[:1]
        for name, shape in derived.items()
        if "embed" not in name
    }
    with torch.device("meta"):
        model = nanophi.Phi(cfg)
    assert {name: tuple(p.shape) for name, p in model.state_dict().items()} == derived
