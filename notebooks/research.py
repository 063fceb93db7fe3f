# %% [markdown]
# # Experiments with nanophi
#
# Your own loop, data, loss and comparison, with the library's parts; then the same checkpoint in
# transformers and TRL. Everything runs on a CPU in seconds, because the models are tiny: two
# layers, width 32, 30 steps. What such models show about large ones is little. What they do
# show is how to ask: with a baseline, with several seeds, and with an interval.
#
# 自己写训练循环、数据、损失，做对比实验；再用 transformers 和 TRL 打开同一个检查点。模型极小，
# 结论不能照搬到大模型；要学的是怎样提问：有基线，有几个种子，有误差范围。

# %%
import functools
import math
import statistics
import sys
import warnings
from pathlib import Path

import numpy as np
import torch

import nanophi

sys.path.insert(0, str(Path(nanophi.__file__).parents[1]))  # the repository
from examples import small
from nanophi.train.losses import validation_loss
from notebooks.show import has, plot

SEEDS = (0, 1, 2, 3)
STEPS = 30
tok = small.tokenizer()
texts = [text for name in ("sft", "rephrased") for text in small.texts(name)]
encoded = [[*tok.encode(text), tok.eos_id] for text in texts if len(text) > 20]
held_out = nanophi.Packed(encoded[::8], context=256, batch_rows=4, seed=0)
learned = [ids for number, ids in enumerate(encoded) if number % 8]
print(f"{len(learned)} texts to learn from, {len(encoded[::8])} held out")

# %% [markdown]
# ## 1. A training loop of your own
#
# `Phi` is a plain `nn.Module`, a batch comes from `batch_at(step)`, and a loss function returns a
# sum and a count. So any loop will do. This one has one AdamW and nothing else;
# `examples/loop.py` and `nanophi/train/loop.py` add what is missing.
#
# Phi 是普通的 nn.Module，批次来自 `batch_at(step)`，损失函数返回和与个数：循环怎么写都行。


# %%
def fit(model, data, lr, loss_fn):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95))
    model.train()
    for step in range(STEPS):
        share = nanophi.schedule("wsd", step, STEPS, warmup=5)
        for group in optimizer.param_groups:
            group["lr"] = lr * share
        loss, count, _ = loss_fn(model, data.batch_at(step))
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def packed(seed):
    return nanophi.Packed(learned, context=256, batch_rows=2, seed=seed)


@functools.cache  # a baseline is trained once, however often it is compared with
def run(seed, lr=0.02, attention="auto", data=packed, loss_fn=None):
    """Train a model; returns it and its loss on held-out text, in nats a token."""
    cfg = nanophi.PhiConfig(
        vocab_size=2048,
        hidden_size=32,
        num_attention_heads=2,
        num_hidden_layers=2,
        intermediate_size=128,
        max_position_embeddings=256,
    )
    torch.manual_seed(seed)
    model = nanophi.Phi(cfg, attention=attention)
    model.set_vocabulary(len(tok))
    fit(model, data(seed), lr, loss_fn or nanophi.next_token_loss)
    model.eval()
    model.attention = "auto"  # all are judged in the same way
    means = validation_loss(model, held_out.in_order(), tok.byte_lengths())
    return model, means["val_loss"]


print(f"ln V {math.log(len(tok)):.3f}")
for seed in SEEDS:
    print(f"seed {seed}: {run(seed)[1]:.3f}")

# %% [markdown]
# The seed changes the first weights and the order of the texts, and nothing else. How far apart
# the numbers above are is the noise that every comparison below has to beat.
#
# 种子只改变初始权重和文本的次序。上面几个数的差距就是噪声，下面的每个比较都要先胜过它。
#
# ## 2. Data of your own
#
# Anything with `batch_at(step)` is data. `Windows` cuts random windows out of one long stream, as
# many training codes do: no packing, no boundaries. Let the batch be a pure function of (seed,
# step), and a run can be resumed from the number of the step alone.
#
# 只要有 `batch_at(step)` 就是数据。批次只由（种子，步数）决定，断点续训就只需要记住步数。


# %%
class Windows:
    """Random windows of one long stream of tokens."""

    def __init__(self, seed, context=256, rows=2):
        self.stream = torch.tensor([token for ids in learned for token in ids])
        self.seed, self.context, self.rows = seed, context, rows

    def batch_at(self, step):
        dice = np.random.default_rng([self.seed, step])
        starts = dice.integers(len(self.stream) - self.context, size=self.rows)
        places = torch.from_numpy(starts)[:, None] + torch.arange(self.context)
        ids, targets = self.stream[places], self.stream[places + 1]
        rows = torch.arange(self.rows + 1, dtype=torch.int32)
        return nanophi.Batch(ids, targets, cu_seqlens=rows * self.context)


print(Windows(0).batch_at(0))
print(packed(0).batch_at(0))
print(f"windows {run(0, data=Windows)[1]:.3f}, packed {run(0)[1]:.3f}: one seed each")

# %% [markdown]
# ## 3. An ablation: does isolation matter?
#
# In a packed row some six texts lie side by side. With the backend "causal" they see each other;
# otherwise they do not. Each seed is trained both ways, from the same weights and on the same rows,
# so the differences are paired: what a seed does to both runs cancels.
#
# The interval is mean ± t · s / √n, with t = 3.18 for four seeds and 95 % (Student 1908). If it
# holds 0, these runs have not shown a difference. That is no proof that there is none: this model
# is too small and too briefly trained to make much use of context, and four seeds are few.
#
# 打包的一行里有好几篇短文。互相看得见，损失会变差吗？同一个种子两种都训练，只比差值。
# 如果区间包含 0，就是没有看出差别，而不是“证明了没有差别”。

# %%
isolated = [run(seed)[1] for seed in SEEDS]
mixed = [run(seed, attention="causal")[1] for seed in SEEDS]
differences = [b - a for a, b in zip(isolated, mixed, strict=True)]
for seed, values in enumerate(zip(isolated, mixed, differences, strict=True)):
    print(f"seed {seed}: ", "  ".join(f"{value:+.3f}" for value in values))
mean = statistics.mean(differences)
half = 3.18 * statistics.stdev(differences) / math.sqrt(len(SEEDS))
print(f"mixed - isolated: {mean:+.3f}, from {mean - half:+.3f} to {mean + half:+.3f}")
print(f"between seeds: {statistics.stdev(isolated):.3f} (one standard deviation)")
print("shown" if abs(mean) > half else "not shown by these runs")

# %% [markdown]
# ## 4. A changed loss
#
# z-loss adds c · (log Z)² to each token's loss, where Z is the sum of exp(logit). It keeps logits
# from drifting, which low precision needs (PaLM, Chowdhery et al. 2022, section 5, with c = 1e-4;
# here c is larger, as there are only 30 steps). It acts directly on log Z, so that one seed shows
# it. Whether the held-out loss gains is another question, and would need many.
#
# z-loss 惩罚 log Z 偏离 0。它直接作用在 log Z 上，一个种子就看得出来；
# 损失有没有变好，则要很多种子才能说。


# %%
def with_z_loss(model, batch, c=1e-2):
    logits = model(batch.ids, batch.cu_seqlens).flatten(0, 1)[batch.learned]
    targets = batch.targets.flatten()[batch.learned]
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    z = logits.logsumexp(-1).square().sum()
    return loss + c * z, len(targets), {"z": z.detach()}


@torch.no_grad()
def log_z(model):
    batch = held_out.batch_at(0)
    logits = model(batch.ids, batch.cu_seqlens).flatten(0, 1)[batch.learned]
    return logits.logsumexp(-1).mean().item()


for name, loss_fn in (("plain", None), ("z-loss", with_z_loss)):
    model, loss = run(0, loss_fn=loss_fn)
    print(f"{name:7} mean log Z {log_z(model):6.2f}   held-out loss {loss:.3f}")

# %% [markdown]
# ## 5. A sweep of the learning rate
#
# Three rates, three seeds. Two curves whose bars overlap are not ranked by these runs. And the
# best of a sweep looks a little better than it is: it was chosen by the number that is reported.
# For a claim, choose on one held-out set and report on another.
#
# 学习率：三个值，三个种子。误差棒重叠，就分不出高下。用同一份数据挑选、又用它报告，
# 结果总会偏好一点。

# %%
sweep = {}
for lr in (0.005, 0.02, 0.08):
    losses = [run(seed, lr=lr)[1] for seed in SEEDS[:3]]
    sweep[lr] = losses
    shown = " ".join(f"{loss:.3f}" for loss in losses)
    deviation = statistics.stdev(losses)
    print(f"lr {lr:<6} {shown}   {statistics.mean(losses):.3f} ± {deviation:.3f}")


def bars(figure):
    axes = figure.subplots()
    means = [statistics.mean(losses) for losses in sweep.values()]
    deviations = [statistics.stdev(losses) for losses in sweep.values()]
    axes.errorbar(list(sweep), means, yerr=deviations, marker="o", capsize=4)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("held-out loss")


plot(bars, "(the picture needs matplotlib, and a notebook)")

# %% [markdown]
# ## 6. The same checkpoint in transformers
#
# A checkpoint directory is one of a `PhiForCausalLM`, chat template inside. So tools made for
# transformers' models can read it.
#
# 检查点目录就是 transformers 的 PhiForCausalLM 目录，对话模板也在里面。没有安装：
# `pip install transformers`。

# %%
small.model("dpo")  # trained, if it is not yet
if has("transformers"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoModelForCausalLM, AutoTokenizer

        theirs = AutoModelForCausalLM.from_pretrained(small.OUT / "dpo")
        their_tok = AutoTokenizer.from_pretrained(small.OUT / "dpo")
    ours, _ = nanophi.load(small.OUT / "dpo")
    turns = [{"role": "user", "content": small.QUESTION}]
    prompt = their_tok.apply_chat_template(turns, tokenize=False)
    ids = their_tok(prompt)["input_ids"]
    print("same ids:", ids == nanophi.chat_prompt(small.QUESTION, tok))
    with torch.no_grad():
        row = torch.tensor([ids])
        difference = (ours(row) - theirs(row).logits).abs().max()
    print("same logits:", bool(difference < 1e-4))
    print(their_tok.decode(theirs.generate(row, max_new_tokens=40)[0, len(ids) :]))
else:
    print("pip install transformers")

# %% [markdown]
# ## 7. The same loss in TRL
#
# TRL's `DPOTrainer` on the same pair, with the same policy and reference, computes the loss that
# `nanophi.dpo_loss` gives. Two programs that were written apart and agree are better evidence than
# a test that its author wrote.
#
# The line in braces is TRL's own report.
#
# 同一对数据，同一个策略和参考模型，TRL 的 DPO 损失同这里的一致。花括号里的那一行是 TRL 自己的报告。
# 没有安装：`pip install trl`。

# %%
question, good, bad = small.pairs()[0]
asked = {"role": "user", "content": question}
sides = [
    nanophi.encode_chat([asked, {"role": "assistant", "content": answer}], tok)
    for answer in (good, bad)
]
pair = nanophi.Pairs([nanophi.Preference(*sides)], batch_pairs=1, seed=0)
with torch.no_grad():
    policy = nanophi.answer_logps(small.model("dpo"), pair.batch_at(0))
    reference = nanophi.answer_logps(small.model("sft"), pair.batch_at(0))
print(f"nanophi: {nanophi.dpo_loss(*policy, *reference, beta=0.1):.4f}")

if has("trl") and has("datasets"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        prompt = tok.decode(nanophi.chat_prompt(question, tok))
        rows = [{"prompt": prompt, "chosen": good, "rejected": bad}]
        frozen = AutoModelForCausalLM.from_pretrained(small.OUT / "sft")
        args = DPOConfig(
            output_dir=str(small.OUT / "trl"),
            beta=0.1,
            max_steps=1,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_dropout=True,
            max_length=None,
            dataloader_pin_memory=False,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            logging_strategy="no",
        )
        trainer = DPOTrainer(
            theirs,
            frozen,
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=their_tok,
        )
        step = trainer.train()
    print(f"TRL:     {step.training_loss:.4f}, before its first step")
else:
    print("pip install trl")

# %% [markdown]
# ## What next
#
# - A new optimizer, schedule, preference loss or sampling filter is one row of a table of the
#   library: CONTRIBUTING.md lists such changes, with what each takes.
# - `python pretrain.py --help` names what the real loop can do that `fit` cannot: exact resume,
#   several devices, half precision, a log.
# - Before you believe an effect, run the baseline twice with two seeds. If those two differ as
#   much as your effect, you have measured a seed.
#
# 新的优化器、学习率曲线、损失、采样过滤器，都只是库里某张表的一行，见 CONTRIBUTING.md。
# 相信一个结果之前，先用两个种子把基线跑两遍：如果它们的差距和你的“效果”一样大，你量到的只是种子。
