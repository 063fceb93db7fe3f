"""Answer a prompt, chat in the terminal, answer from documents, or compare two models.

    python generate.py --model out/dpo --prompt 感冒了要怎么办？
    python generate.py --model out/dpo --chat
    python generate.py --model out/dpo --rag documents/ --prompt 黄河的水为什么那么黄？
    python generate.py --model out/sft --compare out/dpo

Greedy unless --temperature is given. With --prompt the answer alone goes to standard output (sources to standard
error); without it, --chat, --rag and --compare ask for questions until /exit or Ctrl-D. /reset forgets what was said,
/save FILE.jsonl keeps it, Ctrl-C stops an answer and not the program.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from nanophi.cli import UserError, flag, run_command
from nanophi.infer.generate import stream
from nanophi.infer.modes import Reply, chatting, comparing, converse, retrieving
from nanophi.infer.rag import build_index
from nanophi.model.checkpoint import load_with_tokenizer
from nanophi.model.phi import Phi
from nanophi.tokenizer.chat import chat_prompt
from nanophi.tokenizer.tokenizer import Tokenizer


@dataclass(kw_only=True)
class Config:
    model: str = flag(help="a checkpoint directory, as pretrain.py, sft.py and dpo.py write")
    prompt: str | None = flag(
        None, help="one question, put into the chat template; the answer is printed"
    )
    chat: bool = flag(False, help="ask questions at the terminal; /exit or Ctrl-D ends")
    rag: list[str] | None = flag(
        None, help="answer from these documents: files, directories or globs"
    )
    compare: str | None = flag(
        None, help="a second checkpoint, whose answer is put beside the first's"
    )
    raw: bool = flag(False, help="continue --prompt as it is, without the template")
    history: int = flag(
        0,
        at_least=0,
        help="earlier turns that --chat shows the model; 0 suits single-turn teaching",
    )
    chunks: int = flag(2, at_least=1, help="--rag: best chunks given to the model")
    threshold: float = flag(
        0.21, at_least=0, help="--rag: best score (0 to 1) below which nothing counts as found"
    )
    max_new_tokens: int = flag(256, at_least=1, help="longest answer")
    temperature: float = flag(0.0, at_least=0, help="0 is greedy; higher is more varied")
    top_k: int | None = flag(None, help="sample from the k likeliest tokens")
    top_p: float | None = flag(
        None, help="sample from the likeliest tokens that together reach this probability"
    )
    repetition_penalty: float = flag(1.0, help="above 1: tokens already seen become less likely")
    no_repeat_ngram_size: int = flag(0, help="never repeat a run of this many tokens")
    seed: int = flag(0, at_least=0, help="of the sampling")
    bos: bool = flag(False, help="put [BOS] first, for models trained with --bos")
    device: str = flag("auto", help="auto: cuda where there is one, else cpu")


def answer(model: Phi, tok: Tokenizer, prompt: list[int], cfg: Config, show: bool = True) -> str:
    """Answer, printing as it comes where `show`."""
    longest = model.cfg.max_position_embeddings
    if len(prompt) >= longest:
        raise UserError(
            f"the prompt has {len(prompt)} tokens, the model was made for {longest}: shorten it"
        )
    how = {
        name: getattr(cfg, name) for name in ("temperature", "top_k", "top_p", "repetition_penalty")
    }
    if cfg.temperature > 0:
        how["generator"] = torch.Generator(model.lm_head.weight.device).manual_seed(cfg.seed)
    pieces = []
    for piece in stream(
        model, tok, prompt, cfg.max_new_tokens, no_repeat_ngram_size=cfg.no_repeat_ngram_size, **how
    ):
        pieces.append(piece)
        if show:
            print(piece, end="", flush=True)
    if show:
        print()
    return "".join(pieces)


def mode(model: Phi, tok: Tokenizer, cfg: Config) -> Callable[[], Reply]:
    """What starts a conversation, by the flags."""

    def say(prompt: list[int]) -> str:
        return answer(model, tok, prompt, cfg)

    def answers_of(model: Phi, tok: Tokenizer):
        return lambda question: answer(
            model, tok, chat_prompt(question, tok, cfg.bos), cfg, show=False
        )

    if cfg.rag:
        index = build_index(cfg.rag, tok)
        return lambda: retrieving(say, tok, index, cfg.chunks, cfg.threshold, cfg.bos)
    if cfg.compare:
        other = load_with_tokenizer(cfg.compare, cfg.device)
        return lambda: comparing(
            {cfg.model: answers_of(model, tok), cfg.compare: answers_of(*other)}
        )
    return lambda: chatting(say, tok, model.cfg.max_position_embeddings, cfg.history, cfg.bos)


def main(cfg: Config) -> None:
    modes = [name for name in ("chat", "rag", "compare") if getattr(cfg, name)]
    if (
        len(modes) > 1
        or not (modes or cfg.prompt is not None)
        or (cfg.chat and cfg.prompt is not None)
    ):
        raise UserError(
            "say what to do: --prompt TEXT or --chat; --rag FILES or --compare DIR, with --prompt or without"
        )
    if cfg.raw and modes:
        raise UserError(f"--raw goes with --prompt alone: --{modes[0]} needs the template")
    if cfg.temperature == 0 and (cfg.top_k or cfg.top_p):
        raise UserError(
            "--top-k and --top-p choose among sampled tokens: give --temperature too, 0.8 say"
        )
    if cfg.prompt is not None and not cfg.prompt.strip():
        raise UserError("--prompt is empty: there is no question to answer")
    if cfg.compare == cfg.model:
        raise UserError(f"--compare {cfg.compare} is the model itself: name another")
    model, tok = load_with_tokenizer(cfg.model, cfg.device)
    if cfg.raw:
        answer(model, tok, [tok.bos_id] * cfg.bos + tok.encode(cfg.prompt), cfg)
        return
    start = mode(model, tok, cfg)
    if cfg.prompt is not None:
        start()(cfg.prompt)
    else:
        converse(start)


if __name__ == "__main__":
    run_command(Config, main)
