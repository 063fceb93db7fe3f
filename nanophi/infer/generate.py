"""Generation: prefill the prompt once, then decode one token at a time from the KV cache.

    ids = generate(model, prompt_ids, max_new_tokens=100)                    all at once, one prompt or many
    for piece in stream(model, tok, prompt): print(piece, end="")            text as it comes, whole characters

Both take transformers' keywords (temperature, top_k, top_p, repetition_penalty, no_repeat_ngram_size, eos_token_id)
and are greedy unless a temperature is given.
"""

import codecs
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from nanophi.cli import UserError
from nanophi.infer.sampling import Sampling, choose
from nanophi.model.phi import KVCache, Phi
from nanophi.tokenizer.tokenizer import Tokenizer

Eos = int | list[int] | None | Literal["config"]


def stop_ids(model: Phi, eos_token_id: Eos) -> set[int]:
    """The ids that end an answer."""
    eos = model.cfg.eos_token_id if eos_token_id == "config" else eos_token_id
    return set() if eos is None else {eos} if isinstance(eos, int) else set(eos)


@torch.inference_mode()
def decode_steps(
    model: Phi,
    prompts: list[list[int]],
    max_new_tokens: int,
    how: Sampling,
    generator: torch.Generator | None = None,
) -> Iterator[list[int]]:
    """Yield the next id of every prompt, max_new_tokens times. Rows go on after their [EOS]; the caller stops them."""
    device = model.lm_head.weight.device
    longest = max(map(len, prompts))
    left_pad = [longest - len(prompt) for prompt in prompts]
    ids = torch.tensor(
        [[model.cfg.pad_token_id] * pad + p for pad, p in zip(left_pad, prompts, strict=True)]
    )
    pad = torch.tensor(left_pad, device=device) if any(left_pad) else None
    cache = KVCache(model.cfg, len(prompts), longest + max_new_tokens, model.lm_head.weight, pad)
    history = [list(prompt) for prompt in prompts]
    for _ in range(max_new_tokens):
        last = model.hidden(ids.to(device), cache=cache)[
            :, -1
        ]  # only the last position needs the head
        new = choose(model.lm_head(last), history, how, generator)
        for row, token in zip(history, new, strict=True):
            row.append(token)
        yield new
        ids = torch.tensor(new)[:, None]


def generate(
    model: Phi,
    ids: list[int] | Tensor | Sequence[list[int]],
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    no_repeat_ngram_size: int = 0,
    eos_token_id: Eos = "config",
    generator: torch.Generator | None = None,
) -> list:
    """Continue one prompt (list of ids, or LongTensor (T,)) -> the new ids, [EOS] included; or a list of prompts -> a
    list of lists. Greedy at temperature 0. eos_token_id: the config's by default; None never stops early."""
    ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
    many = bool(ids) and not isinstance(ids[0], int)
    prompts = [list(map(int, prompt)) for prompt in ids] if many else [ids]
    if not ids or not all(prompts):
        raise UserError("a prompt is empty: there is nothing to continue")
    how = Sampling(temperature, top_k, top_p, repetition_penalty, no_repeat_ngram_size)
    eos = stop_ids(model, eos_token_id)
    answers: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    for new in decode_steps(model, prompts, max_new_tokens, how, generator):
        for row in list(running):
            answers[row].append(new[row])
            if new[row] in eos:
                running.discard(row)
        if not running:
            break
    return answers if many else answers[0]


def stream(
    model: Phi,
    tok: Tokenizer,
    prompt: str | list[int],
    max_new_tokens: int = 256,
    eos_token_id: Eos = "config",
    **how,
) -> Iterator[str]:
    """Yield the continuation of `prompt` (taken as it is; `chat_prompt` makes one) in pieces of whole characters.

    [EOS] ends the stream and is not part of it; nor is a character that max_new_tokens cuts in half.
    how: temperature, top_k, ... as in `generate`.
    """
    ids = tok.encode(prompt) if isinstance(prompt, str) else list(prompt)
    if not ids:
        raise UserError("the prompt is empty: there is nothing to continue")
    generator = how.pop("generator", None)
    eos = stop_ids(model, eos_token_id)
    utf8 = codecs.getincrementaldecoder("utf-8")(
        "replace"
    )  # holds back the bytes of an unfinished character
    for (new,) in decode_steps(model, [ids], max_new_tokens, Sampling(**how), generator):
        if new in eos:
            break
        if piece := utf8.decode(
            tok.id_to_bytes.get(new, b"")
        ):  # a row that is no token spells nothing
            yield piece
