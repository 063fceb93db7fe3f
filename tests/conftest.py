"""Shared by all tests: hermetic (no network, nothing outside tmp_path), tiny models, throw-away
tokenizers.
"""

import json
import os

# Before any oracle is imported: a test that needs a hub must fail, not wait.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["NANOPHI_LANG"] = "en"  # whatever the locale of whoever runs the tests
# Before torch is imported, here and in subprocesses: a second thread waits for work by spinning,
# and tiny models give it none. It doubled the CPU time of the tests.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import settings

import dpo
import pretrain
import sft
import train_tokenizer
from examples import small
from nanophi.model.config import PhiConfig
from nanophi.model.phi import Phi
from nanophi.text import clean, shards
from nanophi.tokenizer.bpe import train_bpe

settings.register_profile("nanophi", deadline=None, max_examples=60)
settings.load_profile("nanophi")

TEXTS = [
    "感冒了要多喝水，好好休息；发烧超过三天，就应该去看医生。",
    "春天来了，小草从土里探出头来。孩子们在公园里放风筝，风筝越飞越高……",
    "问：月亮为什么会发光？答：月亮本身不发光，它反射的是太阳的光。",
    "He said: don't worry, it's 3.14159 — isn't it? 版本 2.0 支持 Python 3.11 与 C++17。",
    "床前明月光，疑是地上霜。\n举头望明月，低头思故乡。",
    "aaaa aaaaaaa 哈哈哈哈哈哈哈！！   \t\n\n  空格   很多",
] * 3


@pytest.fixture(scope="session")
def tok():
    """A byte-level tokenizer of some 400 tokens."""
    return train_bpe(TEXTS, vocab_size=400)


def tiny_config(**changes) -> PhiConfig:
    shape = {"vocab_size": 448, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    return PhiConfig(**shape | {"intermediate_size": 64, "max_position_embeddings": 64} | changes)


def tiny_model(seed: int = 0, spread: float = 0.1, **changes) -> Phi:
    """Random everywhere, biases and norms too, so that no parameter's effect is hidden by a zero or
    a one.
    """
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = Phi(tiny_config(**changes))
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * spread)
    return model.eval()


QUESTION, ANSWER = "感冒了要怎么办？", "多喝温水，好好休息；如果发烧超过三天，就要去看医生。"

RAW = [
    "感冒多由病毒引起，要多喝温水，好好休息；発燒超過三天，應該去看醫生！！！",
    "春天来了，小草从土里探出头来，孩子们在公园里放风筝",
    "<p>月亮本身不发光，它反射的是太阳的光。</p>",
    "睡前少看手机，早点上床，睡眠会好一些。。。。",
    "夏天喝绿豆汤可以解暑，冬天喝姜汤可以驱寒。",
] * 4
SFT = [
    {"instruction": QUESTION, "input": "", "output": ANSWER},
    {"instruction": "怎样才能睡得好", "input": "", "output": "睡前少看手机，早点上床。"},
    {"instruction": "月亮会发光吗？", "input": "", "output": "不会，它反射的是太阳的光。"},
]
PREFERENCES = [
    {"prompt": row["instruction"], "chosen": row["output"], "rejected": "我不知道。"} for row in SFT
]


def write(path, rows):
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return str(path)


@pytest.fixture(scope="session")
def house(tmp_path_factory):
    """Raw text to a chat model, by the scripts' main(cfg)."""
    out = tmp_path_factory.mktemp("house")
    common = {"overwrite": True, "context": 128, "warmup": 5, "device": "cpu"}
    raw = write(out / "raw.jsonl", [{"text": text} for text in RAW])
    clean.main(clean.Config(input=[raw], out=str(out / "clean.jsonl")))
    texts = [str(out / "clean.jsonl"), write(out / "sft.jsonl", SFT)]
    train_tokenizer.main(
        train_tokenizer.Config(input=texts, out=str(out / "tokenizer"), vocab_size=500)
    )
    shards.main(
        shards.Config(
            input=texts[:1],
            tokenizer=str(out / "tokenizer"),
            out=str(out / "tokens"),
            val_fraction=0.2,
        )
    )
    pretrain.main(
        pretrain.Config(
            data=str(out / "tokens"), tokenizer=str(out / "tokenizer"), out=str(out / "pretrain"),
            preset="demo", width=64, layers=2, heads=2, mlp=128, steps=30, lr=1e-2, eval_every=10,
            batch_tokens=128, **common,
        )
    )  # fmt: skip
    sft.main(
        sft.Config(
            init_from=str(out / "pretrain"),
            data=texts[1:],
            out=str(out / "sft"),
            epochs=40,
            lr=1e-2,
            batch_tokens=128,
            **common,
        )
    )
    pairs = write(out / "dpo.jsonl", PREFERENCES)
    dpo.main(
        dpo.Config(
            init_from=str(out / "sft"),
            data=[pairs],
            out=str(out / "dpo"),
            steps=5,
            batch_pairs=3,
            lr=1e-3,
            **common,
        )
    )
    return out


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory):
    """A directory with the trained small model in out/small, and data/ as in the repository."""
    folder = tmp_path_factory.mktemp("learning")
    (folder / "data").symlink_to(small.ROOT / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        small.model("dpo")
    return folder


@pytest.fixture
def at_small(small_folder, monkeypatch):
    monkeypatch.chdir(small_folder)
    return small_folder
