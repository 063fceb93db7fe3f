"""Preference pairs: the family of losses beside TRL's, prompts that are computed once, and the
reference that is kept.
"""

import json
import shutil
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import dpo
from nanophi.cli import UserError
from nanophi.model.attention import branches_of
from nanophi.model.checkpoint import load_with_tokenizer, save
from nanophi.train.held_out import Reference, Watch, divergence
from nanophi.train.loop import train
from nanophi.train.losses import (
    PREFERENCE_LOSSES,
    PreferenceOptions,
    answer_logps,
    make_dpo_loss_fn,
)
from nanophi.train.preferences import Pairs, Preference, share_of_prompts
from nanophi.train.preflight import show_batch
from nanophi.train.reference import REFERENCE, digest_of_weights
from nanophi.train.run_files import METRICS, STATE
from tests.conftest import PREFERENCES, tiny_model, write
from tests.train.test_loop import random_pairs, state, tensors


def lines_of(out):
    return [json.loads(line) for line in (out / METRICS).read_text().splitlines()]


# ---- the prompt once


def gradients_of(model, batches):
    model.zero_grad()
    logps = torch.cat([answer_logps(model, batch) for batch in batches])
    (logps * torch.arange(1, len(logps) + 1)).sum().backward()
    return logps.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("attention", ["manual", "sdpa", "documents"])
@pytest.mark.parametrize("heads", [4, 2])
def test_a_shared_prompt_changes_nothing(attention, heads):
    """Also where micro-batches cut the step, prompts have one token, and answers begin alike."""
    model = tiny_model(num_key_value_heads=heads).double()
    model.attention = attention
    pairs = random_pairs()
    pairs[3] = Preference(*[(pairs[3].chosen[0], pairs[3].chosen[1])] * 2)
    expected = gradients_of(model, [Pairs(pairs, 7, 0).batch(range(7))])
    batch = Pairs(pairs, 7, 0, share=True).batch(range(7))
    assert len(batch) == 7
    for batches in (
        [batch],
        [batch.cut(0, 3), batch.cut(3, 7)],
        [batch.cut(i, i + 1) for i in range(7)],
    ):
        for found, wanted in zip(gradients_of(model, batches), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_rows_with_branches():
    pair = Preference(
        ([5, 6, 7, 8, 9], [False, False, False, True, True]), ([5, 6, 7, 3], [False] * 3 + [True])
    )
    assert pair.shared == 2
    batch = Pairs([pair], 1, 0, multiple=8, share=True).batch([0])
    assert batch.ids.tolist() == [[5, 6, 7, 8, 7, 0, 0, 0]]
    assert batch.targets.tolist() == [[-100, -100, 8, 9, 3, -100, -100, -100]]
    assert batch.cu_seqlens.tolist() == [0, 2, 4, 5, 8]
    assert batch.branches.continues.tolist() == [-1, 0, 0, -1]
    assert batch.answer.tolist() == [0, 0, 1]
    assert batch.real_tokens == 5
    assert share_of_prompts([pair]) == 2 / 7


def test_an_answer_is_shown_behind_its_prompt(tok):
    from nanophi.tokenizer.chat import encode_chat

    sides = [
        encode_chat(
            [{"role": "user", "content": "你好"}, {"role": "assistant", "content": answer}], tok
        )
        for answer in ("你好！", "嗯。")
    ]
    pairs = [Preference(*sides)]
    apart, together = (
        show_batch(Pairs(pairs, 1, 0, share=share).batch([0]), tok) for share in (False, True)
    )
    assert apart == together
    assert "⟦" in apart


def test_empty_segments_are_no_documents():
    branches = branches_of([0, 0, 2, 3, 5], [-1, 0, 0, -1])
    assert branches.tokens.tolist() == [0, 1, 2, 3, 4]
    assert branches.cu_seqlens.tolist() == [0, 2, 3, 5]


# ---- the losses


def trls_simpo(gains, options):
    """The loss of TRL's CPOTrainer, which is SimPO's."""
    from types import SimpleNamespace

    from trl.experimental.cpo import CPOTrainer

    trainer = SimpleNamespace(
        loss_type="simpo",
        beta=options.beta,
        simpo_gamma=options.target_margin,
        alpha=0.0,
        label_smoothing=options.label_smoothing,
        accelerator=SimpleNamespace(device="cpu"),
    )
    return CPOTrainer.cpo_loss(trainer, *gains)[0]


def test_simpo_is_trls():
    import warnings

    torch.manual_seed(0)
    gains = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    options = PreferenceOptions(2.0, label_smoothing=0.1, target_margin=0.7)
    ours = PREFERENCE_LOSSES["simpo"].function(*gains, options)
    (mine,) = torch.autograd.grad(ours.sum(), gains)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = trls_simpo(gains, options)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mine, torch.autograd.grad(theirs.sum(), gains)[0])


SKY = "天空是什么颜色？"
TRLS = {  # ours -> TRL's name, and what both take. On one pair "aot" is cDPO
    "sigmoid": ("sigmoid", {}),
    "smoothed": ("aot", {"label_smoothing": 0.1}),
    "sigmoid-norm": ("sigmoid_norm", {}),
    "ipo": ("ipo", {}),
    "hinge": ("hinge", {}),
    "with sft": (["sigmoid", "sft"], {"sft_weight": 0.5}),
}


WAYS = {  # of TRL's to compute the same
    "padded": {},
    "padding-free": {"padding_free": True},
    "reference before": {"precompute_ref_log_probs": True},
}


@pytest.mark.parametrize(
    ("name", "way"),
    [*((name, "padded") for name in TRLS), *(("sigmoid", way) for way in list(WAYS)[1:])],
)
def test_losses_and_gradients_are_trls(name, way, tok, tmp_path):
    """One pair, through TRL's DPOTrainer in fp64: the loss of a batch and the gradient of all
    weights; with the prompt computed twice and once.
    """
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from datasets import Dataset
        from transformers import AutoTokenizer
        from trl import DPOConfig, DPOTrainer

        from tests.model.test_phi import hf_twin

        policy = tiny_model(seed=0).double()
        reference = tiny_model(seed=1, spread=0.1).double()
        tok.save(tmp_path)
        row = {
            "prompt": "##提问:\n天空是什么颜色？\n##回答:\n",
            "chosen": "蓝色。",
            "rejected": "我不知道，不知道。",
        }
        theirs, more = TRLS[name]
        args = DPOConfig(
            output_dir=str(tmp_path / "trl"), beta=0.1, disable_dropout=True, bf16=False,
            loss_type=theirs if isinstance(theirs, list) else [theirs],
            loss_weights=[1.0, 0.5] if isinstance(theirs, list) else None,
            label_smoothing=more.get("label_smoothing", 0.0), gradient_checkpointing=False,
            use_cpu=True, report_to=[], max_length=None, dataloader_pin_memory=False, **WAYS[way],
        )  # fmt: skip
        hf = hf_twin(policy).double()
        trainer = DPOTrainer(
            hf, hf_twin(reference).double(), args=args, train_dataset=Dataset.from_list([row]),
            processing_class=AutoTokenizer.from_pretrained(tmp_path),
        )  # fmt: skip
        hf.train()
        their_loss = trainer.compute_loss(hf, next(iter(trainer.get_train_dataloader())))
        their_loss.backward()
    from nanophi.tokenizer.chat import encode_chat

    sides = [
        encode_chat(
            [
                {"role": "user", "content": SKY},
                {"role": "assistant", "content": row[key]},
            ],
            tok,
        )
        for key in ("chosen", "rejected")
    ]
    loss_fn = make_dpo_loss_fn(0.1, "sigmoid" if name in ("smoothed", "with sft") else name, **more)
    twins = dict(hf.named_parameters())
    for share in (False, True):
        data = Pairs([Preference(*sides)], 1, 0, share=share)
        with torch.no_grad():
            data.reference = answer_logps(reference, data.batch([0])).view(-1, 2)
        policy.zero_grad()
        loss, count, _ = loss_fn(policy, data.batch([0]))
        loss.backward()
        assert count == 1
        assert loss.item() == pytest.approx(their_loss.item(), rel=1e-6)
        for path, parameter in policy.named_parameters():
            torch.testing.assert_close(parameter.grad, twins[path].grad, rtol=1e-5, atol=1e-6)


# ---- the script


def tune(house, out, **changes):
    return dpo.main(
        dpo.Config(
            **{"init_from": f"{house}/sft", "data": [f"{house}/dpo.jsonl"], "out": str(out)}
            | {"steps": 4, "warmup": 0, "batch_pairs": 2, "device": "cpu"}
            | changes
        )
    )


@pytest.mark.parametrize("share", ["on", "off"])
@pytest.mark.parametrize("loss", PREFERENCE_LOSSES)
def test_every_loss_learns_and_is_resumed_exactly(house, tmp_path, loss, share, monkeypatch):
    flags = {"loss": loss, "share_prompt": share, "sft_weight": 0.1}
    tune(house, tmp_path / "whole", **flags)
    with monkeypatch.context() as patch:
        patch.setattr(dpo, "train", partial(train, stop_at=2))
        tune(house, tmp_path / "parts", **flags)
    tune(house, tmp_path / "parts", **flags, resume="yes")
    whole, parts = (tensors(state(tmp_path / name)) for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], value) for name, value in parts.items())
    lines = lines_of(tmp_path / "whole")
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert (tmp_path / "whole" / REFERENCE).exists() == PREFERENCE_LOSSES[loss].reference
    assert {"logps_chosen", "tokens_rejected", "rewards_chosen"} <= lines[0].keys()


def test_the_reference_is_kept_and_refused_by_name(house, tmp_path, capsys, monkeypatch):
    tune(house, tmp_path)
    first = tensors(state(tmp_path)["model"])
    path = tmp_path / REFERENCE
    kept = path.read_bytes()
    capsys.readouterr()
    tune(house, tmp_path, overwrite=True)
    assert "is read from" in capsys.readouterr().out
    assert all(torch.equal(a, first[name]) for name, a in tensors(state(tmp_path)["model"]).items())
    pairs = write(tmp_path / "fewer.jsonl", PREFERENCES[:-1])
    for changes, reason in (
        ({"init_from": f"{house}/pretrain"}, "is that of other weights"),
        ({"data": [pairs]}, "is that of other data"),
        ({"dtype": "bfloat16"}, "is that of other dtype"),
    ):
        path.write_bytes(kept)
        tune(house, tmp_path, overwrite=True, **changes)
        assert f"{reason}: what the reference thinks is computed again" in capsys.readouterr().out
    for place in (10, len(kept) // 2, len(kept) - 3):
        damaged = bytearray(kept)
        damaged[place] ^= 4
        path.write_bytes(damaged)
        tune(house, tmp_path, overwrite=True)
        assert f"{REFERENCE} is damaged" in capsys.readouterr().out


def test_prompts_are_shared_where_they_are_long(house, tmp_path, capsys):
    rows = [
        {"prompt": SKY * 4 + str(n), "chosen": "蓝色。", "rejected": "红色。"} for n in range(8)
    ]
    data = [write(tmp_path / "long.jsonl", rows)]
    losses = {}
    for share in ("auto", "off"):
        tune(house, tmp_path / share, data=data, share_prompt=share)
        losses[share] = [line["loss"] for line in lines_of(tmp_path / share)]
        assert ("computes its prompt once" in capsys.readouterr().out) == (share == "auto")
    assert losses["auto"] == pytest.approx(losses["off"], abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "ipo", "label_smoothing": 0.1}, "--loss ipo takes no --label-smoothing"),
        ({"target_margin": 1.0}, "--loss sigmoid takes no --target-margin"),
        ({"share_prompt": "on", "attention": "causal"}, "would see each other"),
        ({"loss": "dpo"}, "no loss is called 'dpo'"),
        ({"share_prompt": "maybe"}, "share_prompt"),
    ],
)
def test_what_does_not_go_together(house, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        tune(house, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_what_goes_wrong_is_said_once(capsys):
    watch = Watch()
    means = {
        "val_logps_chosen": -20.0, "val_tokens_chosen": 10.0, "val_margin": 1.0,
        "val_answer_tokens": 20.0,
    }  # fmt: skip
    worse = [
        {},
        {"val_logps_chosen": -26.0, "val_answer_tokens": 29.0},
        {"val_logps_chosen": -30.0, "val_margin": 25, "val_answer_tokens": 31.0},
    ]
    for changes in worse:
        watch.look(means | changes)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert "less likely, by 0.6 nats a token" in lines[0]
    assert "the margin of rewards is 25" in lines[1]
    assert "have grown from 20 to 31 tokens" in lines[2]


def test_short_answers_that_grow_by_some_tokens_are_no_news(capsys):
    """From 2 tokens to 5 is growth by 2.5, and nothing to speak of."""
    watch = Watch()
    means = {"val_logps_chosen": -20.0, "val_tokens_chosen": 10.0, "val_margin": 1.0}
    for tokens in (2.0, 5.0):
        watch.look(means | {"val_answer_tokens": tokens})
    assert capsys.readouterr().out == ""


def test_the_divergence_is_that_of_torch():
    """Both models over the whole vocabulary, at the tokens of all answers and nowhere else."""
    policy, reference = tiny_model(seed=1).train(), tiny_model(seed=2)
    pairs = random_pairs()
    kls = []
    with torch.no_grad():
        for ids, mask in (side for pair in pairs for side in pair.sides):
            p, q = (
                model(torch.tensor([ids[:-1]]))[0, torch.tensor(mask[1:])].log_softmax(-1)
                for model in (policy, reference)
            )
            kls += F.kl_div(q, p, log_target=True, reduction="none").sum(-1).tolist()
    for share in (True, False):
        found = divergence(policy, reference, Pairs(pairs, 3, 0, share=share))
        assert found == pytest.approx(sum(kls) / len(kls), rel=1e-4)
        assert divergence(policy, policy, Pairs(pairs, 3, 0, share=share)) == 0
    assert policy.training


def test_the_kl_to_the_start_grows(house, tmp_path, capsys):
    tune(house, tmp_path, val_fraction=0.7, eval_every=2, batch_pairs=1, lr=1e-2)
    kls = [line["val_kl"] for line in lines_of(tmp_path) if "val_kl" in line]
    assert 0 < kls[0] < kls[1]
    assert f"kl {kls[1]:.3f}" in capsys.readouterr().out
    assert all(line["val_answer_tokens"] > 0 for line in lines_of(tmp_path) if "val_kl" in line)


def test_a_start_that_has_changed_since_is_said_and_the_run_goes_on(house, tmp_path, capsys):
    """sft.py was run again while dpo.py ran: its model is no longer the reference."""
    start = tmp_path / "sft"
    shutil.copytree(house / "sft", start)
    model, tok = load_with_tokenizer(start)
    reference = Reference(str(start), None, "auto", "cpu", digest_of_weights(model))
    assert reference.again() is not None
    with torch.no_grad():
        model.lm_head.bias[9] += 1
    save(start, model, tok)
    assert reference.again() is None
    assert reference.again() is None
    shutil.rmtree(start)
    assert Reference(str(start), None, "auto", "cpu", "").again() is None
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "has changed since the start: the KL to the reference is no longer" in lines[0]


def test_accuracy_stands_beside_its_error_and_length(house, tmp_path, capsys):
    tune(house, tmp_path, val_fraction=0.7, eval_every=2, batch_pairs=1)
    line = [line for line in lines_of(tmp_path) if "val_accuracy" in line][-1]
    assert 0 <= line["val_accuracy_error"] <= 0.5
    printed = capsys.readouterr().out
    assert f"(by length {line['val_accuracy_by_length']:.0%})" in printed
    assert "(one standard error), where length alone would be right" in printed


def test_runs_from_before_the_family_are_resumed(house, tmp_path, monkeypatch):
    """--beta had the default 0.1 and now has that of the loss, which is the same for sigmoid."""
    with monkeypatch.context() as patch:
        patch.setattr(dpo, "train", partial(train, stop_at=2))
        tune(house, tmp_path, share_prompt="off")
    saved = state(tmp_path)
    assert saved["settings"]["beta"] == "0.1"
    for name in ("label_smoothing", "target_margin", "sft_weight", "skip_bad"):
        del saved["settings"][name]
    torch.save(saved, tmp_path / STATE)
    tune(house, tmp_path, share_prompt="off", resume="yes")
    assert len(lines_of(tmp_path)) == 4
