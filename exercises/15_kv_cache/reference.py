import torch

import nanophi

ROOM = 64


def new_cache(model):
    return nanophi.KVCache(model.cfg, rows=1, room=ROOM, like=model.lm_head.weight)


def forward(model, ids, cache):
    return model(torch.tensor([ids]), cache=cache)[0]


def decode(model, prompt, count):
    return nanophi.generate(model, prompt, max_new_tokens=count, eos_token_id=None)


__all__ = ["decode", "forward", "new_cache"]
