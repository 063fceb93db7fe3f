"""Tokens a second of greedy decoding beside transformers' generate: the same weights and prompts.

    python bench/decoding.py --models 8m --rows 1 4 8
    python bench/decoding.py --models 0.2b --rows 1 4 8 --tokens 24

Each side is a process of its own on the same core(s), and the sides take turns. The weights are
random, the prompts 32 tokens long, and no answer ends early. A run reads the prompts and writes
--tokens tokens for each; the median of all runs but the first counts.

    fp32, fp16, int8     this repository, by the precision of the weights
    hf-dynamic           transformers with sdpa attention and its usual cache
    hf-static            the same with a static cache
    hf-compiled          the same, its forward pass by torch.compile (--compiled)
    llama.cpp-f16, -q8_0 llama.cpp with the same weights as GGUF, by its server (--llama-cpp)

    python bench/decoding.py --checkpoint out/pretrain --text held-out.jsonl

says what each precision costs in bits per byte of real text, read as it is decoded.
"""

import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from llama import LlamaCpp
from machine import cpu_has, cpu_name, measured_alone
from table import print_head, print_row

from nanophi.cli import flag, run_command
from nanophi.infer.products import PRODUCTS, why_not

MODELS = {  # name -> preset, changes
    "8m": ("demo", {"vocab_size": 8192, "hidden_size": 256, "num_hidden_layers": 5,
                    "num_attention_heads": 8, "intermediate_size": 1024,
                    "max_position_embeddings": 512}),
    "0.2b": ("phi2-chinese-0.2b", {}),
}  # fmt: skip
OURS = [name for name in PRODUCTS if why_not(name) is None]
THEIRS = ("hf-dynamic", "hf-static")
LLAMA_CPP = ("llama.cpp-f16", "llama.cpp-q8_0")
PROMPT = 32


@dataclass(kw_only=True)
class Config:
    models: list[str] | None = flag(None, help=f"of {', '.join(MODELS)}")
    rows: list[int] | None = flag(None, help="answers at once (default: 1 4 8)")
    checkpoint: str | None = flag(None, help="a model with its tokenizer, for --text")
    text: list[str] | None = flag(None, help="documents to score with each precision")
    tokens: int = flag(100, at_least=2, help="of each answer")
    cores: int = flag(1, at_least=1, help="cores of each side")
    repeats: int = flag(3, at_least=1, help="processes of each side, taking turns")
    compiled: bool = flag(False, help="also transformers with torch.compile, which takes minutes")
    llama_cpp: bool = flag(False, help="also llama.cpp (pip install xllamacpp)")


def main(cfg: Config) -> None:
    if cfg.checkpoint is not None and cfg.text is not None:
        score(cfg.checkpoint, cfg.text)
    cores = sorted(os.sched_getaffinity(0))[-cfg.cores :]
    features = [name for name in ("avx512_vnni", "avx512f", "avx2") if cpu_has(name)]
    print(
        f"{len(cores)} core(s) of {cpu_name()} ({', '.join(features)}), {cfg.tokens} tokens, "
        f"medians of {cfg.repeats} processes\n"
    )
    if not cfg.models:
        return
    print_head("model", "rows", "side", "tokens/s", "x transformers", "as fp32's")
    sides = [*OURS, *THEIRS]
    if cfg.compiled:
        sides.append("hf-compiled")
    if cfg.llama_cpp:
        sides.extend(LLAMA_CPP)
    for name in cfg.models:
        with tempfile.TemporaryDirectory() as folder:
            make_model(name, folder)
            for rows in cfg.rows or [1, 4, 8]:
                compare(cfg, cores, sides, name, folder, rows)


def score(checkpoint: str, paths: list[str], documents: int = 60) -> None:
    """Print the bits per byte of documents, cut at the context, by each precision."""
    import math

    import torch

    from nanophi.infer.decoder import Decoder
    from nanophi.model.checkpoint import load_with_tokenizer
    from nanophi.model.phi import KVCache
    from nanophi.text.corpus import read_texts

    model, tok = load_with_tokenizer(checkpoint)
    context = model.cfg.max_position_embeddings
    texts = [tok.encode(text)[:context] for text in itertools.islice(read_texts(paths), documents)]
    print_head("weights", "bits per byte", "of fp32's")
    exact = 0.0
    for name in OURS:
        decoder = Decoder(model, name)
        nats = size = 0.0
        with torch.inference_mode():
            for ids in texts:
                cache = KVCache(model.cfg, 1, len(ids), model.lm_head.weight)
                for part in torch.tensor([ids]).split(8, dim=1):  # the products of decoding
                    states = decoder.hidden(part, cache)
                    place = int(cache.lengths[0])
                    targets = ids[place - part.shape[1] + 1 : place + 1]
                    logprobs = decoder.lm_head(states[0, : len(targets)]).log_softmax(-1)
                    nats -= sum(logprobs[i, t].item() for i, t in enumerate(targets))
                size += len(tok.decode_bytes(ids[1:]))
        bits = nats / math.log(2) / size
        exact = exact or bits
        print_row(name, f"{bits:.5f}", f"{bits / exact:.5f}")


def make_model(name: str, folder: str) -> None:
    import torch

    from nanophi.model.checkpoint import save
    from nanophi.model.config import PhiConfig
    from nanophi.model.phi import Phi
    from nanophi.tokenizer.bpe import train_bpe

    torch.manual_seed(0)
    preset, changes = MODELS[name]
    tok = train_bpe(["春天来了，小草从土里探出头来。"], vocab_size=300)  # GGUF needs one
    save(folder, Phi(PhiConfig.preset(preset, **changes)), tok)


def compare(
    cfg: Config, cores: list[int], sides: list[str], name: str, folder: str, rows: int
) -> None:
    """Run the sides by turns, and print a row for each; all are held against the best of HF's."""
    speeds: dict[str, list[float]] = {side: [] for side in sides}
    answers = {}
    for _ in range(cfg.repeats):
        for side in sides:
            given = [side, folder, str(rows), str(cfg.tokens), str(cfg.cores)]
            measured = measured_alone(__file__, given, cores)
            if measured is not None:
                speeds[side].append(measured["speed"])
                answers[side] = measured["answers"]
    medians = {side: statistics.median(several) for side, several in speeds.items() if several}
    best = max((speed for side, speed in medians.items() if side.startswith("hf")), default=None)
    for side, speed in medians.items():
        same = sum(a == b for a, b in zip(answers[side], answers["fp32"], strict=True))
        ratio = f"{speed / best:.2f}" if best else ""
        print_row(name, str(rows), side, f"{speed:,.1f}", ratio, f"{same} of {rows}")


# ---- one run, in a process of its own


def work(side: str, folder: str, rows: str, tokens: str, cores: str) -> None:
    """Decode several times, and print the speed and the last answers as JSON."""
    import torch

    torch.set_num_threads(int(cores))
    prompts = [[7 + (row * 31 + i * 13) % 4000 for i in range(PROMPT)] for row in range(int(rows))]
    if side.startswith("hf"):
        decode = transformers(side, folder)
    elif side in LLAMA_CPP:
        decode = llama_cpp(side, folder, int(rows), int(cores))
    else:
        decode = nanophi(side, folder)
    speeds = []
    answers: list[list[int]] = []
    for _ in range(4):
        started = time.perf_counter()
        answers = decode(prompts, int(tokens))
        speeds.append(int(rows) * int(tokens) / (time.perf_counter() - started))
    print(json.dumps({"speed": statistics.median(speeds[1:]), "answers": answers}))


def nanophi(side: str, folder: str):
    from nanophi.infer.generate import generate
    from nanophi.model.checkpoint import load

    model, _ = load(folder)
    model.decoding_weights = side
    return lambda prompts, tokens: generate(model, prompts, tokens, eos_token_id=None)


def transformers(side: str, folder: str):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    model.generation_config.eos_token_id = None
    if side == "hf-compiled":
        model.forward = torch.compile(model.forward, dynamic=True)
    how = {} if side == "hf-dynamic" else {"cache_implementation": "static"}

    def decode(prompts, tokens):
        ids = torch.tensor(prompts)
        done = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
            pad_token_id=0, **how,
        )  # fmt: skip
        return done[:, ids.shape[1] :].tolist()

    return decode


def llama_cpp(side: str, folder: str, rows: int, cores: int):
    """Its server within this process, asked by as many clients as there are rows."""
    from nanophi.infer.gguf import save_gguf
    from nanophi.model.checkpoint import load

    path = Path(folder) / f"{side}.gguf"
    if not path.exists():
        model, tok = load(folder)
        save_gguf(path, model, tok, side.removeprefix("llama.cpp-"))
    server = LlamaCpp(path, rows=rows, cores=cores)

    def ask(prompt, tokens):
        how = {"n_predict": tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        return server.post("/completion", prompt=prompt, return_tokens=True, **how)["tokens"]

    def decode(prompts, tokens):
        with ThreadPoolExecutor(rows) as clients:
            return list(clients.map(lambda prompt: ask(prompt, tokens), prompts))

    return decode


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(*sys.argv[2:])
    else:
        run_command(Config, main)
