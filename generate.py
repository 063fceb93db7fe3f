"""Answer a prompt, or chat in the terminal.

    python generate.py --model out/dpo --prompt 感冒了要怎么办？
    python generate.py --model out/dpo --chat

Greedy unless --temperature is given. The answer alone goes to standard output.
"""

from dataclasses import dataclass

import torch

from nanophi.cli import UserError, flag, run
from nanophi.infer.generate import stream
from nanophi.model.checkpoint import load_with_tokenizer
from nanophi.model.phi import Phi
from nanophi.text.chat import chat_prompt
from nanophi.text.tokenizer import Tokenizer


@dataclass(kw_only=True)
class Config:
    model: str = flag(help="a checkpoint directory, as pretrain.py, sft.py and dpo.py write")
    prompt: str | None = flag(None, help="one question, put into the chat template; the answer is printed")
    chat: bool = flag(False, help="ask questions at the terminal; /exit or Ctrl-D ends")
    raw: bool = flag(False, help="continue --prompt as it is, without the template")
    history: int = flag(0, at_least=0, help="earlier turns that --chat shows the model; 0 suits single-turn teaching")
    max_new_tokens: int = flag(256, at_least=1, help="longest answer")
    temperature: float = flag(0.0, at_least=0, help="0 is greedy; higher is more varied")
    top_k: int | None = flag(None, help="sample from the k likeliest tokens")
    top_p: float | None = flag(None, help="sample from the likeliest tokens that together reach this probability")
    repetition_penalty: float = flag(1.0, help="above 1: tokens already seen become less likely")
    no_repeat_ngram_size: int = flag(0, help="never repeat a run of this many tokens")
    seed: int = flag(0, at_least=0, help="of the sampling")
    bos: bool = flag(False, help="put [BOS] first, for models trained with --bos")
    device: str = flag("auto", help="auto: cuda where there is one, else cpu")


def answer(model: Phi, tok: Tokenizer, prompt: list[int], cfg: Config) -> str:
    """Print the answer as it comes; returns it."""
    longest = model.cfg.max_position_embeddings
    if len(prompt) >= longest:
        raise UserError(f"the prompt has {len(prompt)} tokens, the model was made for {longest}: shorten it")
    how = {"temperature": cfg.temperature, "top_k": cfg.top_k, "top_p": cfg.top_p}
    how |= {"repetition_penalty": cfg.repetition_penalty, "no_repeat_ngram_size": cfg.no_repeat_ngram_size}
    if cfg.temperature > 0:
        how["generator"] = torch.Generator(model.lm_head.weight.device).manual_seed(cfg.seed)
    pieces = []
    for piece in stream(model, tok, prompt, cfg.max_new_tokens, **how):
        print(piece, end="", flush=True)
        pieces.append(piece)
    print()
    return "".join(pieces)


def chat(model: Phi, tok: Tokenizer, cfg: Config) -> None:
    messages: list[dict] = []
    while True:
        try:
            question = input("提问> ").strip()
        except EOFError:
            print()
            return
        if question == "/exit":
            return
        if not question:
            continue
        messages.append({"role": "user", "content": question})
        messages = messages[-1 - 2 * cfg.history :]
        while len(prompt := chat_prompt(messages, tok, cfg.bos)) > model.cfg.max_position_embeddings and messages[1:]:
            messages = messages[2:]  # the oldest turn does not fit any more
        try:
            messages.append({"role": "assistant", "content": answer(model, tok, prompt, cfg)})
        except UserError as error:
            print(error)
            messages = []


def main(cfg: Config) -> None:
    if (cfg.prompt is not None) == cfg.chat:
        raise UserError("say what to do: --prompt TEXT or --chat")
    if cfg.chat and cfg.raw:
        raise UserError("--raw goes with --prompt: a chat needs the template")
    if cfg.temperature == 0 and (cfg.top_k or cfg.top_p):
        raise UserError("--top-k and --top-p choose among sampled tokens: give --temperature too, 0.8 say")
    model, tok = load_with_tokenizer(cfg.model, cfg.device)
    if cfg.chat:
        chat(model, tok, cfg)
    elif cfg.raw:
        answer(model, tok, [tok.bos_id] * cfg.bos + tok.encode(cfg.prompt), cfg)
    else:
        answer(model, tok, chat_prompt(cfg.prompt, tok, cfg.bos), cfg)


if __name__ == "__main__":
    run(Config, main)
