import json
import tempfile
from pathlib import Path

import torch

import nanophi
from examples.loop import train
from nanophi.model import speed

TINY = {
    "vocab_size": 64,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 1024,
}
DOCUMENTS = [[(7 * n + i * (n + 1)) % 64 for i in range(12 + 5 * n)] for n in range(4)]


def build(attention="auto", **changes):
    cfg = nanophi.PhiConfig(**TINY | changes)
    torch.manual_seed(0)
    made = nanophi.Phi(cfg, attention=attention).double()
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return made.eval().requires_grad_(False)


def alibi(attention="auto", **changes):
    """A model with random weights, in fp64. It must not rotate any more."""
    made = build(attention, **changes)
    other = build(attention, **changes, rope_theta=10.0)
    ids = torch.arange(12)[None]
    assert torch.equal(made(ids), other(ids)), "q and k are still rotated: rope_theta matters"
    return made


def close(found, expected, what, limit=1e-6):
    assert found.shape == expected.shape, f"{what}: {tuple(found.shape)}, not {expected.shape}"
    apart = (found - expected).abs().max().item()
    assert apart < limit, f"{what}: {apart:.2g} apart"


def weights_by_hand(made, ids):
    """The attention weights of the first layer: softmax(q k^T / sqrt(K) - slope (i - j))."""
    block = made.model.layers[0]
    h = block.input_layernorm(made.model.embed_tokens(ids))
    width = made.cfg.head_dim
    q, k = (
        layer(h).unflatten(-1, (-1, width)).transpose(1, 2)
        for layer in (block.self_attn.q_proj, block.self_attn.k_proj)
    )
    heads = q.shape[1]
    k = k.repeat_interleave(heads // k.shape[1], dim=1)
    slopes = torch.tensor([2 ** (-8 * (h + 1) / heads) for h in range(heads)])
    places = torch.arange(ids.shape[1])
    distance = places[:, None] - places
    scores = q @ k.mT / width**0.5 - slopes[:, None, None] * distance
    return scores.masked_fill(distance < 0, float("-inf")).softmax(-1)


def test_the_score_falls_with_the_distance():
    ids = torch.arange(20)[None] * 7 % 64
    for shape in ({}, {"num_attention_heads": 3}, {"num_key_value_heads": 2}):
        made = alibi(**shape)
        record = nanophi.Record()
        made(ids, record=record)
        name = f"the attention weights of the first layer, {shape or '4 heads'}"
        close(record.attention[0], weights_by_hand(made, ids), name)


def test_all_backends_compute_the_same():
    """Packed documents too, of which each begins anew."""
    batch = nanophi.Packed(DOCUMENTS, context=64, batch_rows=2, seed=0).batch_at(0)
    expected = alibi("manual")(batch.ids, batch.cu_seqlens)
    for attention in ("sdpa", "documents"):
        found = alibi(attention)(batch.ids, batch.cu_seqlens)
        close(found, expected, f"--attention {attention} and manual")


def test_a_document_does_not_know_where_it_stands_in_a_row():
    made = alibi()
    ids = torch.tensor([DOCUMENTS[0] + DOCUMENTS[1]])
    first = len(DOCUMENTS[0])
    boundaries = torch.tensor([0, first, ids.shape[1]], dtype=torch.int32)
    packed = made(ids, boundaries)[0, first:]
    close(packed, made(torch.tensor([DOCUMENTS[1]]))[0], "a document behind another one, and alone")


def test_decoding_with_a_cache_is_the_same():
    made = alibi()
    ids = torch.tensor([DOCUMENTS[3]])
    cache = nanophi.KVCache(made.cfg, rows=1, room=64, like=made.lm_head.weight)
    parts = ids.split([9, 1, 5, ids.shape[1] - 15], dim=1)
    found = torch.cat([made(part, cache=cache) for part in parts], 1)
    close(found, made(ids), "in pieces, with a cache")
    prompts = [DOCUMENTS[0], DOCUMENTS[2], DOCUMENTS[1][:3]]  # rows of different lengths
    together = nanophi.generate(made, prompts, max_new_tokens=6, eos_token_id=None)
    for prompt, ids in zip(prompts, together, strict=True):
        alone = list(prompt)
        for _ in range(6):
            alone.append(int(made(torch.tensor([alone]))[0, -1].argmax()))
        expected = alone[len(prompt) :]
        assert list(ids) == expected, f"greedy without a cache: {expected}, generate: {list(ids)}"


def test_answers_that_share_a_prompt_stand_at_the_same_distance():
    """The second answer of a pair stands behind the first in the row, and right behind the prompt
    by its positions.
    """
    made = alibi()
    learned = [False] * 6 + [True] * 9
    sides = [(list(range(5, 5 + n)), learned[:n]) for n in (15, 11)]
    sides[1][0][6:] = [40, 41, 42, 43, 44]
    pair = nanophi.Preference(*sides)
    logps = [
        nanophi.answer_logps(made, nanophi.Pairs([pair], 1, seed=0, share=share).batch_at(0))
        for share in (False, True)
    ]
    close(logps[1], logps[0], "two answers in one row, and in a row each")


def test_half_precision_knows_near_from_far():
    """bf16 rounds whole numbers above 256: 599 and 600 would be one place."""
    made = alibi(num_hidden_layers=1)
    ids = torch.arange(600)[None] * 7 % 64
    expected = weights_by_hand(made, ids)[0, :, -1]
    record = nanophi.Record()
    made.bfloat16()(ids, record=record)
    found = record.attention[0][0, :, -1].double()
    close(found, expected, "attention of token 599 in bf16 and by hand", limit=0.02)


def test_the_network_has_a_name_of_its_own():
    made = alibi().float()
    assert made.architecture != "PhiForCausalLM", (
        "it is no PhiForCausalLM any more: give `architecture` in class Phi another name"
    )
    ids = torch.arange(20)[None]
    with tempfile.TemporaryDirectory() as folder:
        nanophi.save(folder, made)
        told = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        loaded, _ = nanophi.load(folder)
        assert torch.equal(loaded(ids), made(ids)), "saved and loaded, it computes something else"
    assert told["architectures"] == [made.architecture], f"config.json says {told['architectures']}"
    assert told["model_type"] != "phi", "config.json still says model_type phi"


def test_speed_changes_nothing():
    """speed.py wraps the blocks, and finds cache and plan at the end of their arguments."""
    batch = nanophi.Packed(DOCUMENTS, context=64, batch_rows=2, seed=0).batch_at(0)
    gradients = []
    for is_fast in (False, True):
        made = alibi().requires_grad_().train()
        if is_fast:
            speed.speed_up(made, recompute=True)
        loss, count, _ = nanophi.next_token_loss(made, batch)
        (loss / count).backward()
        gradients.append([p.grad for p in made.parameters()])
    for plain, fast in zip(*gradients, strict=True):
        close(fast, plain, "a gradient after speed_up, with --recompute")


def test_it_learns():
    alibi()
    torch.manual_seed(0)
    model = nanophi.Phi(nanophi.PhiConfig(**TINY))
    documents = [[(5 * n + i) % 64 for i in range(40)] for n in range(8)]  # counting
    data = nanophi.Packed(documents, context=64, batch_rows=4, seed=0)
    losses = train(model, data, steps=24, lr=0.02)
    fell = f"from {losses[0]:.2f} to {losses[-1]:.2f} in 24 steps"
    assert losses[-1] < losses[0] - 1, f"it learns to count: the loss should fall by 1, not {fell}"
