"""Shared by all tests: hermetic (no network, nothing outside tmp_path), tiny models, throw-away tokenizers."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any oracle is imported: a test that needs a hub must fail, not wait
os.environ["MPLBACKEND"] = "Agg"

import pytest
import torch
from hypothesis import settings

from nanophi.model.config import PhiConfig
from nanophi.model.phi import Phi
from nanophi.text.bpe import train_bpe

settings.register_profile("nanophi", deadline=None, max_examples=60)
settings.load_profile("nanophi")
torch.set_num_threads(2)

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
    """Random everywhere, biases and norms too, so that no parameter's effect is hidden by a zero or a one."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = Phi(tiny_config(**changes))
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * spread)
    return model.eval()
