"""A small model for reading: what the pages of docs/, the notebooks and the exercises look at.

    from examples import small

    tok = small.tokenizer()         # that of `make demo`: the same texts, so the same tokens
    model = small.model("sft")      # or "pretrain", "dpo": 0.46 million parameters

The first call trains all three, in less than a minute, and keeps them in out/small. It computes in
fp64, where rounding is so small that every machine prints the same digits.
"""

import functools
import hashlib
import json
import sys
from pathlib import Path

import torch

import nanophi
from examples.loop import train
from nanophi.text.clean import clean
from nanophi.text.corpus import read_rows
from nanophi.text.schemas import messages_of, preference_of, texts_of
from nanophi.train.losses import make_dpo_loss_fn
from nanophi.train.reference import reference_logps

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data" / "demo"
OUT = Path("out") / "small"  # below the current directory
STAGES = ("pretrain", "sft", "dpo")

QUESTION = "月亮为什么有时圆，有时弯？"  # the sentence that all pages follow


# ---- texts


@functools.cache
def rows(name: str) -> list[dict]:
    """The rows of a file of data/demo: documents, sft, rephrased, dpo or heldout."""
    return list(read_rows([DATA / f"{name}.jsonl"]))


@functools.cache
def texts(name: str) -> list[str]:
    """The cleaned texts of such a file."""
    return [clean(text) for row in rows(name) for text in texts_of(row)]


def documents() -> list[str]:
    """The 24 documents that the small model reads; the first eight speak of the moon."""
    moon = [text for text in texts("documents") if "月" in text][:8]
    others = [text for text in texts("documents") if "月" not in text]
    return moon + others[: 24 - len(moon)]


def conversations() -> list[list[dict]]:
    """The 16 conversations that it is taught: each a question and its answer, first QUESTION."""
    single = [messages_of(row) for row in rows("sft")]
    single = [turns for turns in single if len(turns) == 2 and "背景" not in turns[0]["content"]]
    first = [turns for turns in single if turns[0]["content"] == QUESTION]
    others = [turns for turns in single if turns[0]["content"] != QUESTION]
    return first + others[: 16 - len(first)]


def pairs() -> list[tuple[str, str, str]]:
    """(prompt, chosen, rejected) of the 16 preference pairs that DPO learns from."""
    return [preference_of(row) for row in rows("dpo")[:16]]


# ---- tokenizer and data


@functools.cache
def tokenizer() -> nanophi.Tokenizer:
    """The tokenizer of `make demo`, 2,048 tokens; training it takes a second."""
    trained_on = [text for name in ("documents", "sft", "rephrased", "dpo") for text in texts(name)]
    return nanophi.train_bpe(trained_on, vocab_size=2048)


def packed_documents() -> nanophi.Packed:
    """Rows of 256 tokens, four a step; [EOS] ends each document."""
    tok = tokenizer()
    ids = [[*tok.encode(text), tok.eos_id] for text in documents()]
    return nanophi.Packed(ids, context=256, batch_rows=4, seed=0)


def packed_conversations() -> nanophi.Packed:
    """The same for conversations, of which only the answers are learned."""
    encoded = [nanophi.encode_chat(turns, tokenizer()) for turns in conversations()]
    ids = [ids for ids, _ in encoded]
    masks = [mask for _, mask in encoded]
    return nanophi.Packed(ids, context=256, batch_rows=4, seed=0, masks=masks)


def preference_data(reference: nanophi.Phi) -> nanophi.Pairs:
    """The pairs, four a step, with what the reference thinks of each answer."""
    tok = tokenizer()
    encoded = []
    for prompt, chosen, rejected in pairs():
        asked = {"role": "user", "content": prompt}
        sides = [
            nanophi.encode_chat([asked, {"role": "assistant", "content": answer}], tok)
            for answer in (chosen, rejected)
        ]
        encoded.append(nanophi.Preference(*sides))
    data = nanophi.Pairs(encoded, batch_pairs=4, seed=0)
    data.reference = reference_logps(reference, data, micro_batch=4)
    return data


def config() -> nanophi.PhiConfig:
    return nanophi.PhiConfig(
        vocab_size=2048,
        hidden_size=64,
        num_attention_heads=4,
        num_hidden_layers=4,
        intermediate_size=256,
        max_position_embeddings=512,
    )


# ---- the model


def untrained() -> nanophi.Phi:
    """The model before its first step, in fp64."""
    torch.manual_seed(0)
    model = nanophi.Phi(config()).double()
    model.set_vocabulary(len(tokenizer()))
    return model.eval()


def model(stage: str = "sft") -> nanophi.Phi:
    """The model after "pretrain", "sft" or "dpo", in fp64; a new object for each call."""
    if not is_trained():
        train_all()
    loaded, _ = nanophi.load(OUT / stage)
    return loaded.double()


def losses(stage: str) -> list[float]:
    """The loss of each step of a stage."""
    if not is_trained():
        train_all()
    return json.loads((OUT / "losses.json").read_text())[stage]


def is_trained() -> bool:
    """Whether OUT holds what this file and these texts give."""
    finished = OUT / "finished.txt"
    return finished.exists() and finished.read_text() == fingerprint()


@functools.cache
def fingerprint() -> str:
    sources = [Path(__file__), ROOT / "examples" / "loop.py", *sorted(DATA.glob("*.jsonl"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


def train_all() -> None:
    """Pretraining, SFT and DPO, one after the other; about half a minute on one core."""
    print(f"training the small model, once, into {OUT}: half a minute or two", file=sys.stderr)
    model = untrained()
    curves = {}
    curves["pretrain"] = train(model, packed_documents(), steps=96, lr=6e-3)
    nanophi.save(OUT / "pretrain", model, tokenizer())
    curves["sft"] = train(model, packed_conversations(), steps=60, lr=5e-3)
    nanophi.save(OUT / "sft", model, tokenizer())
    preferences = preference_data(model)
    curves["dpo"] = train(model, preferences, steps=12, lr=2e-4, loss_fn=make_dpo_loss_fn())
    nanophi.save(OUT / "dpo", model, tokenizer())
    (OUT / "losses.json").write_text(json.dumps(curves))
    (OUT / "finished.txt").write_text(fingerprint())
