"""The public door: what editors see, what submodules can be reached, and errors that teach."""

import ast
import doctest
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nanophi
from nanophi import UserError
from tests.conftest import TEXTS, tiny_config, tiny_model

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "nanophi"
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py"
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_are_true(name):
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


def test_enough_docstrings_have_examples():
    """The clever parts are explained by examples that run: packing, masks, merges, sampling."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    having = {
        name
        for name in MODULES
        if any(t.examples for t in finder.find(importlib.import_module(name)))
    }
    assert {
        "nanophi.tokenizer.bpe",
        "nanophi.tokenizer.fast.merges",
        "nanophi.model.attention",
        "nanophi.model.phi",
        "nanophi.train.packing",
        "nanophi.train.losses",
        "nanophi.train.optim",
        "nanophi.infer.sampling",
    } <= having


def test_editors_see_what_python_finds():
    """Names imported on first use are invisible to editors: they were offered nothing."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and not node.orelse][:1]
    seen = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == nanophi._MODULE_OF
    assert (PACKAGE / "py.typed").exists()


def test_submodules_can_be_reached():
    code = (
        "import nanophi\n"
        "print(nanophi.train.losses.CHUNK, nanophi.tokenizer.fast.__doc__ is not None)\n"
        "print(hasattr(nanophi, 'trian'), hasattr(nanophi.train, 'lossess'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        timeout=600,
    )
    assert done.stdout.split() == ["512", "True", "False", "False"]


def test_the_network_trains_without_speed(tmp_path):
    """speed.py only makes training faster: whoever deletes it still trains, and only its two flags
    are missed.
    """
    shutil.copytree(PACKAGE, tmp_path / "nanophi", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "nanophi" / "model" / "speed.py").unlink()
    code = """
        import numpy as np
        from nanophi import *
        from nanophi.train.loop import train
        model = Phi(PhiConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
                              num_hidden_layers=1, num_attention_heads=2))
        data = Packed([np.arange(7, 40)] * 4, context=32, batch_rows=4, seed=0)
        cfg = TrainConfig(out="out", steps=20, lr=1e-2, warmup=1, device="cpu")
        train(model, next_token_loss, data.batch_at, cfg)
        try:
            cfg = TrainConfig(out="other", steps=1, recompute=True, device="cpu")
            train(model, next_token_loss, data.batch_at, cfg)
        except UserError as error:
            print("refused:", error)
    """
    code = "\n".join(line[8:] for line in code.splitlines())
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert "refused: --recompute and --compile need the file nanophi/model/speed.py" in done.stdout
    losses = [
        float(number)
        for number in re.findall(r'"loss": ([\d.]+)', (tmp_path / "out/metrics.jsonl").read_text())
    ]
    assert losses[-1] < losses[0] - 1


@pytest.mark.slow
def test_type_checkers_check_what_people_write(tmp_path):
    """mypy accepted PhiConfig(hiden_size=3) as long as the names came from __getattr__ alone."""
    program = tmp_path / "program.py"
    program.write_text(
        "import nanophi\n"
        "cfg = nanophi.PhiConfig(hiden_size=3)\n"
        "ids: str = nanophi.Tokenizer.load('x').encode('y')\n"
        "nanophi.trian\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), str(program)],
        capture_output=True, text=True, cwd=ROOT, timeout=600,
    )  # fmt: skip
    assert 'Unexpected keyword argument "hiden_size"' in done.stdout
    assert "Incompatible types in assignment" in done.stdout
    assert 'Module has no attribute "trian"' in done.stdout


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda tok: nanophi.train_bpe("一段文字"), "list"),
        (lambda tok: tok.encode(["一", "二"]), "encode_batch"),
        (lambda tok: nanophi.generate(tiny_model(), "你"), "encode"),
        (lambda tok: nanophi.generate(tiny_model(), []), "empty"),
        (lambda tok: nanophi.generate(tiny_model(), [500]), "500"),
        (lambda tok: nanophi.Phi("demo"), r"PhiConfig\.preset"),
        (lambda tok: nanophi.PhiConfig.preset("dmeo"), "there are demo"),
        (lambda tok: nanophi.chat_prompt([{"content": "你好"}], tok), "role"),
        (lambda tok: nanophi.chat_prompt([{"role": "user"}], tok), "content"),
        (lambda tok: nanophi.encode_chat([{"role": "bot", "content": "你"}], tok), "'bot'"),
        (lambda tok: tiny_model()(torch.ones(1, 65, dtype=torch.long)), "65 tokens"),
        (lambda tok: nanophi.schedule("liner", 0, 10, 2), "no schedule is called 'liner'"),
        (lambda tok: nanophi.build_optimizers(tiny_model(), "sgd", 1, 0), "no optimizer"),
    ],
)
def test_errors_say_what_to_do(tok, call, message):
    with pytest.raises(UserError, match=message):
        call(tok)


def test_representations_inform(tok):
    documents = [tok.encode(text) for text in TEXTS]
    packed = nanophi.Packed(documents, 64, 2, seed=0)
    assert repr(packed).startswith("Packed(")
    assert "rows of 64" in repr(packed)
    assert repr(packed.batch_at(0)).startswith("Batch(2 rows of 64 tokens")
    assert f"{len(tok)}" in repr(tok)
    cache = nanophi.KVCache(tiny_config(), 3, 20, torch.zeros(()))
    assert repr(cache) == "KVCache(0 of 20 tokens, 3 rows)"


def test_presets_are_configurations():
    assert nanophi.presets()["demo"] == nanophi.PhiConfig.preset("demo")
    with torch.device("meta"):
        assert nanophi.Phi(nanophi.presets()["demo"]).num_parameters() == 2_566_784
