"""What people do wrong, through the real commands: one line that says what, where and how to fix,
and nothing lost.
"""

import hashlib
import json
import pickle
import re
import resource
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import dpo
import generate
import pretrain
import sft
import train_tokenizer
from nanophi.cli import run_command
from nanophi.infer import evaluate, pairs
from nanophi.text import clean, shards
from nanophi.tokenizer.bpe import train_bpe
from tests.conftest import QUESTION, SFT, TEXTS, write

COMMANDS = {
    "clean": clean, "train_tokenizer": train_tokenizer, "shards": shards, "pretrain": pretrain,
    "sft": sft, "pairs": pairs, "dpo": dpo, "generate": generate, "evaluate": evaluate,
}  # fmt: skip


@pytest.fixture(scope="module")
def bad(house, tmp_path_factory) -> Path:
    """A directory of things that are wrong, beside the house, where all is right."""
    bad = tmp_path_factory.mktemp("bad")
    good = json.dumps({"text": TEXTS[0]}, ensure_ascii=False)
    (bad / "empty.jsonl").touch()
    (bad / "blank.txt").write_text("\n \n", encoding="utf-8")
    (bad / "none").mkdir()
    (bad / "one.jsonl").write_text(good, encoding="utf-8")
    (bad / "broken.jsonl").write_text(f"{good}\n{{'text': 1\n{good}\n", encoding="utf-8")
    (bad / "keys.jsonl").write_text(f'{good}\n{{"title": "无题"}}\n', encoding="utf-8")
    (bad / "gbk.jsonl").write_bytes(f"{good}\n".encode() + good.encode("gbk") + b"\n")
    (bad / "gbk.txt").write_bytes(
        "第一行\n".encode() + "第二行\n".encode("gbk") + "第三行\n".encode()
    )
    (bad / "picture.png").write_bytes(b"\x89PNG")
    write(bad / "questions.jsonl", [SFT[0], {"instruction": "没有回答"}])
    write(bad / "long.jsonl", [{"instruction": "问" * 400, "output": "答。"}])
    write(bad / "turns.jsonl", [{"messages": [{"role": "assistant", "content": "我先说。"}]}])

    def checkpoint(name, change=None):
        target = shutil.copytree(
            house / "sft", bad / name, ignore=shutil.ignore_patterns("best", "step-*")
        )
        if change is not None:
            weights = load_file(target / "model.safetensors")
            change(weights)
            save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
        return target

    bias = "model.layers.1.mlp.fc2.bias"
    checkpoint("missing", lambda weights: weights.pop(bias))
    checkpoint(
        "extra",
        lambda weights: weights.update({"model.layers.9.mlp.fc2.bias": weights[bias].clone()}),
    )
    checkpoint("misshapen", lambda weights: weights.update({bias: weights[bias][:-1].clone()}))
    cut = checkpoint("cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    pickled = checkpoint("pickled")
    (pickled / "model.safetensors").unlink()
    (pickled / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    evil = checkpoint("evil") / "train_state.pt"
    evil.write_bytes(pickle.dumps(print, protocol=2))
    train_bpe(TEXTS, 300).save(bad / "tokenizer")
    foreign = checkpoint("foreign")
    train_bpe(TEXTS, 800, level="char").save(foreign)
    big = train_bpe(TEXTS, 500)
    big.add_tokens([f"<{i}>" for i in range(200)])
    big.save(checkpoint("toolarge"))
    return bad


CLEAN, TOK, SHARDS = (
    "clean --out x.jsonl --input",
    "train_tokenizer --out x --vocab-size 400 --input",
    "shards --out x",
)
SFT_FROM = "sft --init-from {house}/pretrain"
SFT_TO = f"{SFT_FROM} --context 128 --batch-tokens 128 --out x --data"
DPO_TO = "dpo --init-from {house}/sft --context 128 --out x --data"
PRETRAIN = "pretrain --tokenizer {house}/tokenizer --preset demo --context 128 --out x --data"

CASES = [
    # files
    (f"{CLEAN} {{bad}}/missing.jsonl", "no such file, directory or glob: .*missing.jsonl"),
    (f"{CLEAN} {{bad}}/empty.jsonl", "nothing to write to x.jsonl: of 0 rows"),
    (f"{CLEAN} {{bad}}/none", "none holds no file that ends in .jsonl"),
    (f"{CLEAN} {{bad}}/picture.png", "picture.png: unknown format; known are .jsonl"),
    (
        f"{CLEAN} {{bad}}/one.jsonl --sample 1.5",
        "1.5 is out of range: it must be above 0 and at most 1",
    ),
    (f"{TOK} {{bad}}/blank.txt", "no text to train a tokenizer on"),
    (
        f"{SHARDS} --tokenizer {{house}}/tokenizer --input {{bad}}/empty.jsonl",
        "there is no document to train on",
    ),
    (f"{SFT_TO} {{bad}}/empty.jsonl", "of 0 conversations in .*empty.jsonl none has an answer"),
    (f"{DPO_TO} {{bad}}/empty.jsonl", "no pair in .*empty.jsonl is left to train on"),
    ("evaluate --model {house}/sft --data {bad}/empty.jsonl", "empty.jsonl holds no text to score"),
    (
        "pairs --model {house}/sft --out x.jsonl --data {bad}/empty.jsonl",
        "no conversation in .*empty.jsonl",
    ),
    (
        "evaluate --model {house}/sft --choices {bad}/none",
        "none holds no val/, test/ or dev/ folder",
    ),
    ("evaluate --model {house}/sft", "say what to evaluate"),
    ("generate --model {house}/sft --rag {bad}/none --prompt 问", "none holds no file"),
    ("generate --model {house}/sft --rag {bad}/empty.jsonl --prompt 问", "no text"),
    # rows
    (f"{CLEAN} {{bad}}/broken.jsonl --strict", "broken.jsonl, line 2: not JSON"),
    (
        f"{CLEAN} {{bad}}/keys.jsonl --strict",
        "keys.jsonl, line 2: a row with the keys title is no conversation",
    ),
    (
        f"{CLEAN} {{bad}}/gbk.jsonl --strict",
        r"gbk.jsonl, line 2: not UTF-8 \(.* byte \d+ of the file\); it looks like GB18030",
    ),
    (
        f"{SHARDS} --tokenizer {{house}}/tokenizer --strict --input {{bad}}/broken.jsonl",
        "broken.jsonl, line 2: not",
    ),
    (f"{TOK} {{bad}}/broken.jsonl --strict", "broken.jsonl, line 2: not JSON"),
    (
        f"{TOK} {{bad}}/gbk.txt --strict",
        r"gbk.txt, line 2: not UTF-8 \(invalid .*, byte 1\d of the file\); .* convert it",
    ),
    (
        f"{SFT_TO} {{bad}}/questions.jsonl",
        "questions.jsonl, line 2: a row with the keys instruction is no conversation",
    ),
    (f"{SFT_TO} {{bad}}/turns.jsonl", "turns.jsonl, line 1: message 1 is from 'assistant'"),
    (
        f"{SFT_TO} {{bad}}/long.jsonl",
        "of 1 conversations in .*long.jsonl none has an answer and fits in a context of 128",
    ),
    (
        f"{DPO_TO} {{bad}}/questions.jsonl",
        "questions.jsonl, line 1: a preference pair needs prompt, chosen, rejected",
    ),
    (
        "pairs --model {house}/sft --out x.jsonl --data {bad}/keys.jsonl",
        "keys.jsonl, line 1: .* is no conversation",
    ),
    (
        "train_tokenizer --out x --input {bad}/one.jsonl --held-out {bad}/none.txt",
        "no such file, .*none.txt",
    ),
    (
        "train_tokenizer --out x --input {bad}/one.jsonl --level char --split qwen2",
        "--split is for --level byte",
    ),
    (
        "train_tokenizer --out x --input {bad}/one.jsonl --trainer sentencepiece --level char",
        "leave out those flags",
    ),
    (
        "train_tokenizer --out x --input {bad}/blank.txt --trainer sentencepiece",
        "no text to train a tokenizer on",
    ),
    (
        "train_tokenizer --out x --input {bad}/one.jsonl --max-memory 0.1",
        "0.1 is out of range: it must be above 0.3",
    ),
    # sizes
    (
        "train_tokenizer --out x --vocab-size 262 --input {bad}/one.jsonl",
        "vocab_size 262 is too small: .* are 263",
    ),
    (
        f"{PRETRAIN} {{house}}/tokens",
        "too little data for one batch of --batch-tokens 16,384: give --batch-tokens",
    ),
    (
        f"{SFT_FROM} --out x --data {{house}}/sft.jsonl --batch-tokens 9999",
        "too little data for one batch of --batch-tokens 9,999",
    ),
    (
        f"{DPO_TO} {{house}}/dpo.jsonl --batch-pairs 4",
        "too little data for one batch .*: give --batch-pairs 3",
    ),
    (
        f"{SFT_FROM} --out x --data {{house}}/sft.jsonl --context 4096",
        "--context 4096 exceeds the 128",
    ),
    # things that do not belong together
    (
        f"{SHARDS} --tokenizer {{bad}}/none --input {{bad}}/one.jsonl",
        "no tokenizer.json in .*none; python train_tok",
    ),
    (
        "pretrain --tokenizer {bad}/tokenizer --out x --data {house}/tokens",
        "the shards in .* made with another tokeni",
    ),
    (f"{PRETRAIN} {{bad}}/none", "no token shards in .*none; python -m nanophi.text.shards"),
    (
        "generate --model {bad}/toolarge --prompt 问",
        "tokenizer.json has 700 tokens, the model of config.json knows",
    ),
    # checkpoints
    ("generate --model {bad}/none --prompt 问", "no model in .*none: config.json is missing"),
    ("generate --model {bad}/missing --prompt 问", "model.layers.1.mlp.fc2.bias is missing"),
    (
        "generate --model {bad}/extra --prompt 问",
        "model.layers.9.mlp.fc2.bias is not of this model",
    ),
    (
        "generate --model {bad}/misshapen --prompt 问",
        r"model.layers.1.mlp.fc2.bias has the shape \[63\], not \[64\]",
    ),
    ("generate --model {bad}/cut --prompt 问", "model.safetensors is damaged"),
    (
        "generate --model {bad}/pickled --prompt 问",
        "only safetensors weights are read .pytorch_model.bin.* may run code",
    ),
    (
        "sft --init-from {house}/pretrain --context 128 --batch-tokens 128 "
        "--data {house}/sft.jsonl --resume --out {bad}/evil",
        "train_state.pt is damaged",
    ),
    # output
    (
        f"{SFT_FROM} --data {{house}}/sft.jsonl --out {{house}}/dpo",
        "dpo holds a run .*: --resume goes on with it, --overwrite",
    ),
    (
        f"{SFT_TO} {{house}}/sft.jsonl --attention flesh",
        "argument --attention: invalid choice: 'flesh'",
    ),
    (f"{SFT_TO} {{house}}/sft.jsonl --resume", "nothing to resume in x"),
    ("clean --out x.doc --input {bad}/one.jsonl", "x.doc: rows are written as .jsonl"),
    (
        "clean --out {bad}/one.jsonl --input {bad}/one.jsonl",
        "one.jsonl is an input and would be overwritten",
    ),
    # prompts and flags
    (
        f"generate --model {{house}}/sft --prompt {'很长' * 200}",
        "the prompt has .* tokens, the model was made for 128",
    ),
    ("generate --model {house}/sft --prompt ''", "--prompt is empty"),
    ("generate --model {house}/sft --prompt ' ' --raw", "--prompt is empty"),
    ("generate --model {house}/sft", "say what to do: --prompt TEXT, --chat or --serve"),
    ("generate --model {house}/sft --prompt 问 --top-k 5", "give --temperature too"),
    (
        "generate --model {house}/sft --prompt 问 --temperature 1 --top-p 2",
        "argument --top-p: 2 is out of range: it must be above 0 and at most 1",
    ),
    ("generate --model {house}/sft --prompt 问 --chat", "say what to do"),
    ("generate --model {house}/sft --prompt 问 --device gpu", "--device gpu cannot be used here"),
    (f"{SFT_TO} x --step 7", "unrecognized arguments: --step 7; did you mean --steps"),
    (f"{SFT_TO} x --epochs 1 --steps 1", "no such file|give --steps or --epochs"),
    (f"{SFT_TO} x --lr fast", "argument --lr: invalid float value: 'fast'"),
    (f"{SFT_TO} x --dropout 1.5", "1.5 is out of range"),
]


def words(command: str, **places) -> list[str]:
    """'sft --data {bad}/x' -> its arguments; '' and ' ' stay words of their own."""
    found = re.findall(r"'[^']*'|\S+", command)
    return [
        word.strip("'").format(**places) if word.startswith("'") else word.format(**places)
        for word in found
    ]


def snapshot(*directories: Path) -> dict[Path, str]:
    files = (path for directory in directories for path in directory.rglob("*"))
    return {
        path: hashlib.sha1(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in files
    }


@pytest.mark.parametrize(
    ("command", "expected"), CASES, ids=[f"{c[:50]} {e[:20]}" for c, e in CASES]
)
def test_one_line_and_nothing_lost(command, expected, house, bad, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = snapshot(house, bad)
    name, *argv = words(command, house=house, bad=bad)
    with pytest.raises(SystemExit) as stop:
        run_command(COMMANDS[name].Config, COMMANDS[name].main, argv)
    said = capsys.readouterr().err
    assert stop.value.code == 2, said
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert said.splitlines() == lines, "nothing else on standard error"
    assert len(lines) == 1
    assert re.search(expected, lines[0]), said
    assert snapshot(house, bad) == before
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("name", "read", "skipped"),
    [("broken.jsonl", 2, 1), ("keys.jsonl", 1, 1), ("gbk.jsonl", 1, 1), ("gbk.txt", 2, 1)],
)
def test_cleaning_and_encoding_skip_and_count(name, read, skipped, house, bad, tmp_path, capsys):
    counts = clean.main(clean.Config(input=[str(bad / name)], out=str(tmp_path / "x.jsonl")))
    assert (counts["read"], counts["skipped"]) == (read, skipped)
    assert f"skipped: {bad / name}, line 2: " in capsys.readouterr().out
    tokenizer = str(house / "tokenizer")
    config = shards.Config(
        input=[str(bad / name)], tokenizer=tokenizer, out=str(tmp_path / "x"), val_fraction=0
    )
    assert shards.main(config)["skipped"] == skipped
    assert f"skipped: {bad / name}, line 2: " in capsys.readouterr().out


def test_a_vocabulary_larger_than_the_text_gives(bad, tmp_path, capsys):
    argv = ["--input", str(bad / "one.jsonl"), "--out", str(tmp_path / "x"), "--vocab-size", "5000"]
    run_command(train_tokenizer.Config, train_tokenizer.main, argv)
    assert re.search(r"the text gave \d+ of 5,000 tokens", capsys.readouterr().out)


def test_a_question_that_fills_the_context_is_dropped_and_counted(house, bad, tmp_path, capsys):
    argv = words(
        f"{SFT_TO} {{house}}/sft.jsonl {{bad}}/long.jsonl --steps 1 --warmup 0",
        house=house,
        bad=bad,
    )[1:]
    argv[argv.index("x")] = str(tmp_path / "x")
    run_command(sft.Config, sft.main, argv)
    assert "dropped 1 whose question alone fills 128 tokens" in capsys.readouterr().out


def test_a_full_disk_leaves_the_checkpoint_that_was_there(house, tmp_path, capsys):
    run_dir = shutil.copytree(house / "sft", tmp_path / "sft")
    before = snapshot(run_dir)
    argv = words(
        SFT_TO.replace("--out x", "--resume --steps 43 --save-every 1") + " {house}/sft.jsonl",
        house=house,
    )[1:]
    argv += ["--lr", "1e-2", "--out", str(run_dir), "--warmup", "5", "--keep", "0"]
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (50_000, old[1])
    )  # a write beyond it fails as on a full disk
    try:
        with pytest.raises(SystemExit) as stop:
            run_command(sft.Config, sft.main, argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert stop.value.code == 2
    assert "cannot write" in capsys.readouterr().err
    after = snapshot(run_dir)
    for name in ("model.safetensors", "train_state.pt", "tokenizer.json"):
        assert after[run_dir / name] == before[run_dir / name]
    generate.main(generate.Config(model=str(run_dir), prompt=QUESTION, device="cpu"))
