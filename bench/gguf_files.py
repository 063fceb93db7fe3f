"""Our GGUF files in llama.cpp: how near its probabilities are, and which answers it gives.

    python bench/gguf_files.py --model out/demo/dpo --questions data/demo/sft.jsonl

For each type of file: its size, the largest difference of ln p among the 50 likeliest tokens behind
20 questions, and how many of 20 greedy answers are those of `generate`. "With its GELU": our model
computes GELU as llama.cpp does, by a table of fp16 numbers.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from llama import LlamaCpp
from table import print_head, print_row

from nanophi.cli import flag, run_command
from nanophi.infer.generate import generate
from nanophi.infer.gguf import FORMATS, save_gguf
from nanophi.infer.pairs import questions_of
from nanophi.model.checkpoint import load_with_tokenizer
from nanophi.text.corpus import read_rows
from nanophi.tokenizer.chat import chat_prompt

COUNT = 20


@dataclass(kw_only=True)
class Config:
    model: str = flag(help="a checkpoint with its tokenizer")
    questions: str = flag(help="conversations whose first questions are asked")
    tokens: int = flag(120, at_least=1, help="longest answer")


def main(cfg: Config) -> None:
    model, tok = load_with_tokenizer(cfg.model)
    asked = [question for question, _ in read_rows([cfg.questions], use=questions_of)]
    asked = asked[:: max(1, len(asked) // COUNT)][:COUNT]
    answers = []
    for question in asked:
        ids = generate(model, chat_prompt(question, tok), cfg.tokens)
        answers.append(tok.decode(ids, skip_special_tokens=True))
    print_head(
        "type", "MB", "ln p, exact", "with its GELU", "ln p, its defaults",
        f"answers of {len(asked)}",
    )  # fmt: skip
    for kind in FORMATS:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            save_gguf(path, model, tok, kind)
            context = model.cfg.max_position_embeddings
            differences = []
            for exact in (True, False):
                engine = LlamaCpp(path, context=context, exact=exact)
                differences.append(largest_difference(engine, model, tok, asked))
                if exact:
                    with mock.patch.object(F, "gelu", gelu_of_ggml):
                        differences.append(largest_difference(engine, model, tok, asked))
            same = sum(
                said(engine, question, cfg.tokens) == answer
                for question, answer in zip(asked, answers, strict=True)
            )
            size = path.stat().st_size / 1e6
        print_row(kind, f"{size:.1f}", *(f"{d:.4f}" for d in differences), str(same))


GELU = F.gelu


def gelu_of_ggml(x: torch.Tensor, approximate: str) -> torch.Tensor:
    """GELU of x in fp16, in fp16; beyond 10 and -10 it is x and 0."""
    rounded = GELU(x.half().float(), approximate=approximate).half().float()
    return torch.where(x.abs() < 10, rounded, x.relu())


def said(engine: LlamaCpp, question: str, tokens: int) -> str:
    messages = [{"role": "user", "content": question}]
    answer = engine.post(
        "/v1/chat/completions", messages=messages, max_tokens=tokens, temperature=0
    )
    return answer["choices"][0]["message"]["content"]


@torch.inference_mode()
def largest_difference(engine: LlamaCpp, model, tok, texts: list[str]) -> float:
    """Where an answer ends, or a character is half said, llama.cpp tells no probabilities."""
    largest = 0.0
    for text in texts:
        ids = tok.encode(text)
        logprobs = model(torch.tensor([ids]))[0, -1].log_softmax(-1)
        given = engine.post("/completion", prompt=ids, n_predict=1, temperature=0, n_probs=50)
        for first in given.get("completion_probabilities", [])[:1]:
            for row in first["top_logprobs"]:
                largest = max(largest, abs(row["logprob"] - logprobs[row["id"]].item()))
    return largest


if __name__ == "__main__":
    run_command(Config, main)
