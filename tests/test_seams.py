"""One seam per choice: what a reader adds from outside works through the scripts, without a line
changed in them.
"""

import dataclasses
import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer

import dpo
import generate
import pretrain
import sft
from nanophi.cli import UserError, parser_for, run_command
from nanophi.infer import pairs
from nanophi.infer.sampling import FILTERS, NEVER, Filter
from nanophi.model.checkpoint import check_architecture, load, load_with_tokenizer, save
from nanophi.model.phi import MLP, Attention, Phi
from nanophi.text.schemas import SCHEMAS, Schema
from nanophi.tokenizer.chat import chat_prompt, encode_chat
from nanophi.tokenizer.template import TEMPLATES, Segment, Template
from nanophi.train import preflight
from nanophi.train.losses import PREFERENCE_LOSSES, PreferenceLoss
from nanophi.train.optim import OPTIMIZERS, SCHEDULES, OptimizerChoice, decay_groups
from tests.conftest import ANSWER, QUESTION, SFT, tiny_config, tiny_model, write

SHORT = {"overwrite": True, "context": 128, "device": "cpu", "steps": 5, "warmup": 2}


def command(module, *argv: str) -> None:
    """Run a script as the shell does: flags, parser, main."""
    run_command(module.Config, module.main, [*argv, "--device", "cpu"])


def lines_of(out) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# ---- a new optimizer


class Lion(torch.optim.Optimizer):
    """The sign of a momentum (Chen et al. 2023)."""

    def __init__(self, params, lr, weight_decay=0.1, betas=(0.9, 0.99)):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            slow, fast = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                update = state["momentum"].lerp(p.grad, 1 - slow).sign()
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
                state["momentum"].lerp_(p.grad, 1 - fast)


def lion(model, lr, weight_decay):
    return [Lion(decay_groups(list(model.parameters()), weight_decay), lr)]


def test_lion_and_a_linear_schedule_train(house, tmp_path, monkeypatch, capsys):
    """Lion once trained in the tests of the optimizers and died in pretrain.py: a table of memory
    did not know it.
    """
    monkeypatch.setitem(OPTIMIZERS, "lion", OptimizerChoice(lion, state_bytes=4))
    monkeypatch.setitem(
        SCHEDULES, "linear", lambda step, steps, warmup, decay: (steps - step) / (steps - warmup)
    )
    out = tmp_path / "pretrain"
    command(
        pretrain, "--data", str(house / "tokens"), "--tokenizer", str(house / "tokenizer"),
        "--out", str(out), "--preset", "demo", "--layers", "2", "--steps", "5", "--warmup", "2",
        "--batch-tokens", "128", "--context", "128", "--optimizer", "lion", "--schedule", "linear",
        "--lr", "1e-3",
    )  # fmt: skip
    assert "parameters: Lion " in capsys.readouterr().out
    rates = [line["lr"] for line in lines_of(out)]
    assert rates == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3 * 2 / 3, 1e-3 / 3])
    cfg = tiny_config()
    lion_bytes, adamw_bytes = (
        preflight.training_bytes(cfg, name, 1, 64, False, False) for name in ("lion", "adamw")
    )
    assert adamw_bytes - lion_bytes == 4 * tiny_model().num_parameters()


def test_an_unknown_row_names_the_known(house, tmp_path, capsys):
    with pytest.raises(SystemExit):
        parser_for(pretrain.Config, "").parse_args(["--optimizer", "nobodys"])
    said = capsys.readouterr().err
    assert all(f"'{name}'" in said for name in OPTIMIZERS)
    with pytest.raises(UserError, match="no optimizer is called 'nobodys'; there are muon, adamw"):
        pretrain.main(
            pretrain.Config(
                data=str(house / "tokens"), tokenizer=str(house / "tokenizer"),
                out=str(tmp_path / "out"), preset="demo", batch_tokens=128, optimizer="nobodys",
                **SHORT,
            )
        )  # fmt: skip


# ---- a new preference loss


def apo_zero(chosen, rejected, options):
    """D'Oosterlinck et al. 2024, eq. 7: chosen answers shall gain, and rejected ones lose."""
    return 1 - (options.beta * chosen).sigmoid() + (options.beta * rejected).sigmoid()


def test_apo_trains(house, tmp_path, monkeypatch):
    monkeypatch.setitem(PREFERENCE_LOSSES, "apo-zero", PreferenceLoss(apo_zero))
    out = tmp_path / "dpo"
    command(
        dpo, "--init-from", str(house / "sft"), "--data", str(house / "dpo.jsonl"),
        "--out", str(out), "--steps", "3", "--batch-pairs", "3", "--loss", "apo-zero",
    )  # fmt: skip
    assert lines_of(out)[0]["loss"] == pytest.approx(1, rel=1e-3)  # both terms 1/2 at the start


# ---- a new filter


def keep_min_p(logits, history, p):
    """Nguyen et al. 2024: the least probability is a share of the largest."""
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), NEVER)


def test_min_p_is_a_flag(house, monkeypatch, capsys):
    monkeypatch.setitem(
        FILTERS, "min_p", Filter(keep_min_p, float, None, "least share of the best", above=0)
    )
    said = []
    for flags in ([], ["--temperature", "5", "--min-p", "0.999"]):  # only the best is left
        command(
            generate, "--model", str(house / "sft"), "--prompt", QUESTION,
            "--max-new-tokens", "8", *flags,
        )  # fmt: skip
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


# ---- a new template

MARKS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")


def zephyr(messages):
    """A token for each role, and one that ends every message."""
    segments = []
    for message in messages:
        learned = message["role"] == "assistant"
        segments += [
            Segment(f"<|{message['role']}|>", special=True),
            Segment("\n"),
            Segment(message["content"].strip(), learned),
            Segment("<|end|>", learned, special=True),
        ]
    if messages[-1]["role"] == "user":
        segments += [Segment("<|assistant|>", special=True), Segment("\n")]
    return segments


ZEPHYR_JINJA = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>\n' + message['content'] | trim + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if messages[-1]['role'] == 'user' -%}{{- '<|assistant|>\n' -}}{%- endif -%}"
)


@pytest.fixture
def zephyr_template(monkeypatch):
    template = Template(zephyr, ZEPHYR_JINJA, stop="<|end|>", specials=MARKS)
    monkeypatch.setitem(TEMPLATES, "zephyr", template)


@pytest.mark.parametrize("name", ["zephyr", "chatml"])
def test_a_template_is_taught_saved_and_answered(house, tmp_path, zephyr_template, capsys, name):
    """The stop id was set in the model's configuration, and saving invented a role for a token such
    as <|im_start|>.
    """
    out = tmp_path / "sft"
    command(
        sft, "--init-from", str(house / "pretrain"), "--data", str(house / "sft.jsonl"),
        "--out", str(out), "--template", name, "--epochs", "40", "--lr", "1e-2",
        "--batch-tokens", "128", "--warmup", "5",
    )  # fmt: skip
    model, tok = load_with_tokenizer(out)
    assert tok.template == name
    stop = TEMPLATES[name].stop
    assert model.cfg.eos_token_id == tok.special_id(stop)
    capsys.readouterr()
    command(generate, "--model", str(out), "--prompt", QUESTION)
    assert capsys.readouterr().out.strip() == ANSWER

    hf = AutoTokenizer.from_pretrained(out)
    messages = [{"role": "user", "content": QUESTION}]
    assert hf.apply_chat_template(messages)["input_ids"] == chat_prompt(messages, tok)
    assert hf.eos_token == stop
    answered = [*messages, {"role": "assistant", "content": ANSWER}]
    ids, mask = encode_chat(answered, tok)
    assert hf.apply_chat_template(answered)["input_ids"] == ids
    learned = tok.decode([i for i, is_learned in zip(ids, mask, strict=True) if is_learned])
    assert learned == ANSWER + stop
    assert chat_prompt(messages, tok) == ids[: len(chat_prompt(messages, tok))]


def test_a_template_that_was_lost_is_given_again(house, tmp_path, capsys):
    """Another program has saved the tokenizer, with a template that nobody here knows: each command
    names it, and --template puts ours in its place, which the next checkpoint keeps.
    """
    model = tmp_path / "sft"
    shutil.copytree(house / "sft", model)
    config = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["chat_template"] = "{{ '<start_of_turn>' }}"
    (model / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")

    ask = (generate, "--model", str(model), "--prompt", QUESTION)
    with pytest.raises(SystemExit):
        command(*ask)
    message = capsys.readouterr().err
    assert "<start_of_turn>" in message
    assert "is not known here: give --template wenda or chatml" in message
    command(*ask, "--template", "wenda")
    assert capsys.readouterr().out.strip() == ANSWER

    pairs_file = str(tmp_path / "pairs.jsonl")
    command(
        pairs, "--model", str(model), "--data", str(house / "sft.jsonl"), "--out", pairs_file,
        "--template", "wenda", "--similar", "1", "--max-new-tokens", "4",
    )  # fmt: skip
    command(
        dpo, "--init-from", str(model), "--data", pairs_file, "--out", str(tmp_path / "dpo"),
        "--template", "wenda", "--batch-pairs", "1", "--steps", "1", "--warmup", "0",
    )  # fmt: skip
    assert load_with_tokenizer(tmp_path / "dpo")[1].template == "wenda"


def test_a_template_without_room_for_its_tokens_is_refused(house, tmp_path):
    crowded = Template(zephyr, "", specials=tuple(f"<|{i}|>" for i in range(64)))
    TEMPLATES["crowded"] = crowded
    try:
        with pytest.raises(UserError, match="--template crowded needs"):
            sft.main(
                sft.Config(
                    init_from=str(house / "pretrain"), data=[str(house / "sft.jsonl")],
                    out=str(tmp_path / "out"), template="crowded", batch_tokens=128, **SHORT,
                )
            )  # fmt: skip
    finally:
        del TEMPLATES["crowded"]


# ---- a new row schema


def test_question_and_answer_rows_are_learned(house, tmp_path, monkeypatch, capsys):
    rows = [{"ask": row["instruction"], "tell": row["output"]} for row in SFT]
    data = write(tmp_path / "rows.jsonl", rows)
    flags = ["--init-from", str(house / "pretrain"), "--data", data, "--steps", "2"]
    flags += ["--batch-tokens", "128", "--warmup", "1"]
    with pytest.raises(SystemExit):
        command(sft, *flags, "--out", str(tmp_path / "unknown"))
    assert "is no conversation" in capsys.readouterr().err
    monkeypatch.setitem(SCHEMAS, "ask/tell", Schema(asked=("ask",), answers=("tell",)))
    command(sft, *flags, "--out", str(tmp_path / "known"))
    assert "sft: 3 conversations" in capsys.readouterr().out


# ---- a changed network


class SwiGLU(torch.nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.gate = torch.nn.Linear(cfg.hidden_size, cfg.intermediate_size)
        self.fc1 = torch.nn.Linear(cfg.hidden_size, cfg.intermediate_size)
        self.fc2 = torch.nn.Linear(cfg.intermediate_size, cfg.hidden_size)

    def forward(self, x):
        return self.fc2(torch.nn.functional.silu(self.gate(x)) * self.fc1(x))


def test_a_changed_block_needs_a_name_of_its_own(house, tmp_path, monkeypatch):
    """transformers loaded an ALiBi model without a word and computed something else: logits off by
    0.72.
    """
    check_architecture(tiny_model())
    monkeypatch.setattr("nanophi.model.phi.MLP", SwiGLU)
    with pytest.raises(UserError, match=r"Give it a name of its own, such as `architecture = "):
        save(tmp_path / "liar", Phi(tiny_config()))
    assert not (tmp_path / "liar").exists()
    with pytest.raises(UserError, match="does not compute what PhiForCausalLM computes"):
        pretrain.main(
            pretrain.Config(
                data=str(house / "tokens"), tokenizer=str(house / "tokenizer"),
                out=str(tmp_path / "out"), preset="demo", batch_tokens=128, **SHORT,
            )
        )  # fmt: skip
    monkeypatch.setattr(Phi, "architecture", "PhiSwiGLU")
    pretrain.main(
        pretrain.Config(
            data=str(house / "tokens"), tokenizer=str(house / "tokenizer"),
            out=str(tmp_path / "out"), preset="demo", batch_tokens=128, **SHORT,
        )
    )  # fmt: skip
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert told["architectures"] == ["PhiSwiGLU"]
    assert told["model_type"] != "phi"
    model, _ = load(tmp_path / "out")
    assert isinstance(model.model.layers[0].mlp, SwiGLU)
    monkeypatch.setattr(Phi, "architecture", "PhiForCausalLM")
    with pytest.raises(UserError, match="model_type 'nanophi-PhiSwiGLU'"):
        load(tmp_path / "out")


def test_positions_that_change_no_parameter_are_seen_too(monkeypatch):
    forward = Attention.forward

    def without_rotation(self, x, rotary, *rest):
        cos, sin = rotary
        return forward(self, x, (torch.ones_like(cos), torch.zeros_like(sin)), *rest)

    monkeypatch.setattr(Attention, "forward", without_rotation)
    with pytest.raises(UserError, match="does not compute what PhiForCausalLM computes"):
        check_architecture(tiny_model())


def test_checking_takes_no_random_number():
    """A check that drew numbers would make a resumed run differ from the unbroken one."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    check_architecture(tiny_model())
    assert torch.equal(torch.get_rng_state(), before)


def test_estimates_ask_the_network(monkeypatch):
    cfg = tiny_config()
    plain = preflight.size_of(cfg)
    monkeypatch.setattr("nanophi.model.phi.MLP", SwiGLU)
    gated = preflight.size_of(cfg)
    width, inner, layers = cfg.hidden_size, cfg.intermediate_size, cfg.num_hidden_layers
    assert gated.matrices - plain.matrices == layers * width * inner
    assert plain.mlp == inner
    assert gated.mlp == 4 * inner  # gate, fc1, silu(gate) and the product: none is computed again


def test_the_mlp_of_phi_computes_its_activation_again():
    assert "contract" in MLP.forward.__code__.co_names  # what the estimate of memory looks at


def test_configs_have_no_field_that_a_table_would_have_to_repeat():
    names = {field.name for field in dataclasses.fields(generate.Config)}
    assert names.isdisjoint(FILTERS)
