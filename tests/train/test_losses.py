"""Losses: equal to the plain formula, to transformers and to TRL."""

import math

import pytest
import torch

from nanophi.train.losses import (
    CHUNK,
    answer_logps,
    dpo_loss,
    head_cross_entropy,
    make_dpo_loss_fn,
    next_token_loss,
    plain_cross_entropy,
    validation_loss,
)
from nanophi.train.packing import IGNORE, Packed
from nanophi.train.preferences import Pairs, Preference
from tests.conftest import TEXTS, tiny_model


@pytest.mark.parametrize("n", [0, 1, CHUNK, 2 * CHUNK + 3])
def test_chunked_cross_entropy_equals_the_plain_one(n):
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(n, 16), torch.randn(50, 16), torch.randn(50)
    targets = torch.randint(50, (n,))
    inputs = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    plain = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    ours = head_cross_entropy(*inputs, targets)
    theirs = plain_cross_entropy(*plain, targets)
    torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        assert head_cross_entropy(*inputs, targets) == ours
    (ours * 0.3).backward()
    (theirs * 0.3).backward()
    for a, b in zip(inputs, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5)


def test_next_token_loss_counts_targets_and_equals_transformers(tok):
    from tests.model.test_phi import hf_twin

    model = tiny_model()
    documents = [torch.tensor([*tok.encode(text), tok.eos_id]).numpy() for text in TEXTS[:3]]
    batch = Packed(documents, 128, 1, 0).batch_at(0)
    loss, count, _ = next_token_loss(model, batch)
    assert count == (batch.targets != IGNORE).sum() == sum(len(d) - 1 for d in documents)
    hf, theirs = hf_twin(model), 0.0
    for document in documents:
        ids = torch.from_numpy(document)[None]
        theirs += hf(ids, labels=ids).loss.item() * (len(document) - 1)
    assert abs(loss.item() - theirs) < 1e-5 * theirs


def test_dpo_loss_by_hand():
    """One pair whose chosen answer gained 2 nats and whose rejected one lost 3: margin 5, loss
    log(1 + e^-0.5).
    """
    loss = dpo_loss(*(torch.tensor([x]) for x in (-8.0, -13.0, -10.0, -10.0)), beta=0.1)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.5)))
    assert dpo_loss(*[torch.zeros(4)] * 4).tolist() == pytest.approx([math.log(2)] * 4)


def preference_pairs(tok, n=4):
    from nanophi.tokenizer.chat import encode_chat

    def side(question, answer):
        return encode_chat(
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], tok
        )

    return [
        Preference(side(f"问题{i}？", TEXTS[i % 6]), side(f"问题{i}？", "不知道" * (i + 1)))
        for i in range(n)
    ]


def test_answer_logps_sum_over_the_answer_alone(tok):
    model, pairs = tiny_model(max_position_embeddings=128), preference_pairs(tok)
    logps = answer_logps(model, Pairs(pairs, 4, 0).batch(range(4)))
    for i, pair in enumerate(pairs):
        for j, (ids, mask) in enumerate((pair.chosen, pair.rejected)):
            all_logps = model(torch.tensor([ids]))[0].log_softmax(-1)
            expected = sum(all_logps[t - 1, ids[t]].item() for t in range(len(ids)) if mask[t])
            assert logps[2 * i + j].item() == pytest.approx(expected, abs=1e-4)


def test_answer_logps_hold_one_chunk_of_logits(tok, monkeypatch):
    """DPO once kept the logits of all answers, at a vocabulary of 32,768 more than all else
    together.
    """
    batch, found = Pairs(preference_pairs(tok), 4, 0).batch(range(4)), {}
    for chunk in (CHUNK, 7):
        monkeypatch.setattr("nanophi.train.losses.CHUNK", chunk)
        model, computed, kept = tiny_model(), [], []
        model.lm_head.register_forward_hook(
            lambda module, rows, logits, seen=computed: seen.append(len(logits))
        )
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, kept=kept: kept.append(x) or x, lambda x: x
        ):
            logps = answer_logps(model, batch)
        (logps * torch.arange(1.0, 9)).sum().backward()
        assert max(computed) <= chunk
        assert sum(computed) == 2 * len(batch.learned)  # once more in backward ...
        assert not [x for x in kept if x.shape[1:] == (448,)]  # ... as they were not kept
        found[chunk] = [logps, *(p.grad for p in model.parameters())]
    for whole, chunked in zip(*found.values(), strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-5)


def test_dpo_starts_at_ln_2_and_reports_rewards(tok):
    model, data = tiny_model(), Pairs(preference_pairs(tok), 4, 0)
    with torch.no_grad():
        data.reference = answer_logps(model, data.batch(range(4))).view(-1, 2)
    loss, count, sums = make_dpo_loss_fn(0.1)(model, data.batch(range(4)))
    assert count == 4
    assert loss.item() / 4 == pytest.approx(math.log(2), abs=1e-6)
    data.reference += torch.tensor(
        [-2.0, 3.0]
    )  # as if chosen had gained 2 nats and rejected lost 3
    _, _, sums = make_dpo_loss_fn(0.1)(model, data.batch(range(4)))
    rewards = {"rewards_chosen": 0.2, "rewards_rejected": -0.3, "margin": 0.5, "accuracy": 1.0}
    found = {name: value.item() / 4 for name, value in sums.items()}
    assert {name: found[name] for name in rewards} == pytest.approx(rewards, abs=1e-5)
    assert (
        found["tokens_chosen"] == len(data.batch(range(4)).learned) / 4 - found["tokens_rejected"]
    )


def test_validation_loss_in_bits_per_byte(tok):
    """A model that knows nothing needs log2(V) bits a token; [EOS] costs bits but has no byte."""
    model = tiny_model(spread=0.0, resid_pdrop=0.5).train()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    document = torch.tensor([*tok.encode("感冒了要多喝水"), tok.eos_id]).numpy()
    result = validation_loss(model, Packed([document], 64, 1, 0).in_order(), tok.byte_lengths())
    assert model.training  # as it was: dropout once stayed off after the first validation
    text_bytes = sum(len(tok.decode_bytes([i])) for i in document[1:-1])
    assert result["val_loss"] == pytest.approx(math.log(448), abs=1e-5)
    assert result["val_bits_per_byte"] == pytest.approx(
        (len(document) - 1) * math.log2(448) / text_bytes, rel=1e-5
    )


def test_dpo_loss_is_trls(tok, tmp_path):
    """Loss, rewards and log-probabilities of one batch, with trl.DPOTrainer as the oracle."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from datasets import Dataset
        from transformers import AutoTokenizer
        from trl import DPOConfig, DPOTrainer

        from tests.model.test_phi import hf_twin

        policy, reference = tiny_model(seed=0), tiny_model(seed=1, spread=0.1)
        tok.save(tmp_path)
        rows = [
            {
                "prompt": f"##提问:\n问题{i}？\n##回答:\n",
                "chosen": TEXTS[i],
                "rejected": "不知道" * (i + 1),
            }
            for i in range(4)
        ]
        args = DPOConfig(
            output_dir=str(tmp_path / "trl"), beta=0.1, loss_type=["sigmoid"],
            disable_dropout=True, bf16=False, gradient_checkpointing=False, use_cpu=True,
            report_to=[],
            per_device_train_batch_size=4,
            per_device_eval_batch_size=4, max_length=None, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = DPOTrainer(
            hf_twin(policy), hf_twin(reference), args=args, train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(tmp_path),
        )  # fmt: skip
        theirs = trainer.evaluate()
    from nanophi.tokenizer.chat import encode_chat

    def side(row, key):
        question = row["prompt"].split("\n")[1]
        return encode_chat(
            [{"role": "user", "content": question}, {"role": "assistant", "content": row[key]}], tok
        )

    data = Pairs([Preference(side(row, "chosen"), side(row, "rejected")) for row in rows], 4, 0)
    with torch.no_grad():
        data.reference = answer_logps(reference, data.batch(range(4))).view(-1, 2)
        loss, _, sums = make_dpo_loss_fn(0.1)(policy, data.batch(range(4)))
    assert loss.item() / 4 == pytest.approx(theirs["eval_loss"], abs=1e-5)
    assert sums["rewards_chosen"].item() / 4 == pytest.approx(
        theirs["eval_rewards/chosen"], abs=1e-5
    )
    assert sums["rewards_rejected"].item() / 4 == pytest.approx(
        theirs["eval_rewards/rejected"], abs=1e-5
    )
    assert sums["accuracy"].item() / 4 == pytest.approx(theirs["eval_rewards/accuracies"])
