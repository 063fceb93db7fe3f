"""Beam search: the answers that are likeliest as a whole, not token by token.

Each step continues every running beam by every token, and keeps the best `beams` of them by the sum
of their log-probabilities. Those that end are put aside, by their score:

    score = sum of log-probabilities / length ** length_penalty

    running   感冒   -1.0        感冒了   -1.2     runs on
              着凉   -1.4        感冒。   -1.3     ends: aside with -1.3 / 2 ** 1.0 = -0.65
                                 着凉了   -1.9     runs on
                                 着凉。   -2.5     is dropped

It ends when no running beam can become better than the worst that was put aside. Order and meaning
are those of transformers' generate(num_beams=...), so that the same settings give the same tokens.
"""

from dataclasses import dataclass
from typing import Unpack

import torch
from torch import Tensor

from nanophi.cli import UserError
from nanophi.expect import Expected, check
from nanophi.infer.decoder import decoder_of
from nanophi.infer.generate import Eos, as_prompts, check_prompts, prefill, stop_ids
from nanophi.infer.sampling import FILTERS, Ids, Keywords, Sampling
from nanophi.model.phi import KVCache, Phi

NEVER = -1e9  # what takes a beam out of the running


@dataclass
class Beam:
    """An answer, whole or not. score: of a whole one; otherwise the sum of log-probabilities."""

    ids: list[int]
    score: float


@torch.inference_mode()
def beam_search(
    model: Phi,
    ids: list[int],
    beams: int = 4,
    max_new_tokens: int = 256,
    *,
    length_penalty: float = 1.0,
    early_stopping: bool = False,
    eos_token_id: Eos = "config",
    **how: Unpack[Keywords],
) -> list[Beam]:
    """The best `beams` answers to one prompt, best first.

    length_penalty: above 0 favours long answers, below 0 short ones
    early_stopping: end as soon as `beams` answers are whole
    how: the filters that greedy decoding takes, repetition_penalty and so on
    """
    prompts, many = as_prompts(ids)
    if many:
        raise UserError("beam search answers one prompt, a list of ids")
    check(beams, Expected(int, at_least=1), "beams")
    check(length_penalty, Expected(float), "length_penalty")
    sampling = Sampling(**how)
    if not sampling.greedy:
        raise UserError("beam search does not sample: leave temperature out")
    prompt = prompts[0]
    (room,) = check_prompts(model, prompts, max_new_tokens)
    eos = stop_ids(model, eos_token_id)

    network = decoder_of(model)
    cache = KVCache(model.cfg, beams, len(prompt) + room, model.lm_head.weight)
    states = prefill(network, [prompt], cache.part(0, 1)).expand(beams, -1)
    for row in range(1, beams):
        cache.move(0, row)
    # At first all rows are the prompt: only one of them may run.
    running = [Beam([], 0.0), *(Beam([], NEVER) for _ in range(beams - 1))]
    whole: list[Beam] = []
    more = max(2, 1 + len(eos)) * beams  # candidates, so that enough run on where some end
    for length in range(1, room + 1):
        candidates = best_candidates(network.lm_head(states), running, prompt, sampling, more)
        is_end = [ids[-1] in eos or length == room for _, ids, _ in candidates]

        # 1. Those of the best that end are put aside, and the best of all these are kept.
        for (_, answer, total), ends in list(zip(candidates, is_end, strict=True))[:beams]:
            if ends:
                whole.append(Beam(answer, total / length**length_penalty))
        whole = sorted(whole, key=lambda beam: -beam.score)[:beams]

        # 2. The best that do not end run on.
        going_on = [one for one, ends in zip(candidates, is_end, strict=True) if not ends][:beams]
        if not going_on:
            break
        best_hope = going_on[0][2] / length**length_penalty
        if len(whole) == beams and (early_stopping or best_hope <= whole[-1].score):
            break
        rows = [row for row, _, _ in going_on]
        rows += [rows[-1]] * (beams - len(rows))
        cache.reorder(rows)
        running = [Beam(answer, total) for _, answer, total in going_on]
        running += [Beam(running[-1].ids, NEVER)] * (beams - len(running))
        new = torch.tensor([[beam.ids[-1]] for beam in running], device=model.device)
        states = network.hidden(new, cache=cache)[:, -1]
    return whole


def best_candidates(
    logits: Tensor, running: list[Beam], prompt: list[int], how: Sampling, count: int
) -> list[tuple[int, list[int], float]]:
    """The best continuations of all beams: (row, answer, sum of log-probabilities), best first."""
    logprobs = logits.float().log_softmax(-1)  # (beams, V)
    history = [Ids(prompt + beam.ids) for beam in running]
    for name, value in how.chosen.items():
        logprobs = FILTERS[name].apply(logprobs, history, value)
    totals = logprobs + torch.tensor([[beam.score] for beam in running], device=logits.device)
    best = totals.flatten().topk(min(count, totals.numel()))
    found = []
    for total, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        row, token = divmod(place, logprobs.shape[1])
        found.append((row, [*running[row].ids, token], total))
    return found
