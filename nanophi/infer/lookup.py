"""Prompt lookup: guess that an answer goes on as an earlier passage did, and check the guesses.

An answer that quotes its prompt (from documents, or a text to be corrected) repeats runs of it. The
last tokens are looked up in all that came before; what followed there is guessed. One step reads
the guesses together, which costs about what one token costs, and keeps those that the model itself
would have chosen. The answer is the same as without.

    prompt     ... 黄 土 高 原 的 水 ...        the answer ends with  黄 土
    guesses    高 原 的                          from behind the latest 黄 土
    step       reads  土 高 原 的                the model says  高 原 上 ...
    kept       高 原 上                          three tokens for one step

Where the last tokens are new, as behind a word that was corrected, the quotation is taken to go on
where it was: 上 stands for 的, and 水 is guessed next.

Source: Saxena 2023, "Prompt Lookup Decoding"; speculative decoding is Leviathan et al. 2023, whose
draft model a look into the prompt replaces.
"""

from collections.abc import Iterator

import torch

from nanophi.infer.decoder import decoder_of
from nanophi.infer.sampling import Ids, Sampling, choose
from nanophi.model.phi import KVCache, Phi

RUNS = (3, 2)  # how many of the last tokens are looked up; the longer run first


def place_to_guess_from(ids: Ids, quoting: int | None) -> int | None:
    """Where the guesses stand in ids: behind the latest run that is also the end of ids.

    quoting: the place where the last quotation would go on; it counts where no run is found

    >>> place_to_guess_from(Ids([7, 8, 9, 4, 5, 7, 8]), quoting=None)
    2
    >>> place_to_guess_from(Ids([7, 8, 9, 4, 5, 7, 6]), quoting=2)
    2
    """
    for size in RUNS:
        place = ids.behind_latest(size)
        if place is not None:
            return place
    return quoting


@torch.inference_mode()
def lookup_steps(
    model: Phi, prompt: list[int], room: int, eos: set[int], most: int
) -> Iterator[int]:
    """Yield the ids of the greedy answer to one prompt. most: guesses of a step"""
    network = decoder_of(model)
    cache = KVCache(model.cfg, 1, len(prompt) + room, model.lm_head.weight)
    ids = Ids(prompt)
    fed = list(prompt)  # what the step reads
    guesses: list[int] = []
    place: int | None = None  # of the first guess
    while True:
        states = network.hidden(torch.tensor([fed], device=model.device), cache=cache)[0]
        logits = network.lm_head(states[-1 - len(guesses) :])  # behind the last token, each guess
        chosen = choose(logits, [ids] * len(logits), Sampling())
        before = len(ids)
        for number, token in enumerate(chosen):
            ids.append(token)
            yield token
            if token in eos or len(ids) - len(prompt) == room:
                return
            if number == len(guesses) or token != guesses[number]:
                break
        cache.lengths[0] = len(ids) - 1  # wrong guesses are forgotten
        quoting = None if place is None else place + len(ids) - before
        place = place_to_guess_from(ids, quoting)
        left = room - (len(ids) - len(prompt))
        guesses = [] if place is None else ids[place : place + min(most, left - 1)]
        fed = [ids[-1], *guesses]
