"""SFT's own: what is dropped, plain text beside the conversations, and what --show-batch shows."""

import json
import sys
from itertools import pairwise

import pytest
import torch

import dpo
import sft
from nanophi.cli import UserError, run_command
from nanophi.model.checkpoint import load_with_tokenizer
from nanophi.text.shards import TokenSet
from nanophi.train.packing import IGNORE
from tests.conftest import ANSWER, QUESTION, write


def config(house, out, **changes) -> sft.Config:
    given = {
        "init_from": str(house / "pretrain"), "data": [str(house / "sft.jsonl")], "out": str(out),
        "context": 128, "device": "cpu", "batch_tokens": 128, "steps": 2, "warmup": 0,
    }  # fmt: skip
    return sft.Config(**given | changes)


# ---- rows that teach nothing


def row(*turns: str) -> dict:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]}


def test_conversations_that_teach_nothing_are_counted_and_one_of_each_is_shown(
    tok, tmp_path, capsys
):
    """An empty answer was learned: it taught to say nothing."""
    rows = [
        row("你好", "你好！"),
        row("甲", ""), row("乙", "答", "丙", " \n"),
        row("问" * 40, "答"),
        row("短问", "答" * 40), row("也短", "答" * 40),
        row("没有答案"),
    ]  # fmt: skip
    packed = sft.pack([write(tmp_path / "rows.jsonl", rows)], tok, 60, 1, 0, bos=False)
    assert len(packed) == 1
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "sft: 1 conversations, 6 tokens to learn",
        "sft: dropped 2 with an empty answer, the first: 甲",
        f"sft: dropped 1 whose question alone fills 60 tokens, the first: {'问' * 30}…",
        "sft: dropped 2 longer than 60 tokens, the first: 短问",
        "sft: dropped 1 without an answer, the first: 没有答案",
    ]


def test_pairs_that_teach_nothing_are_counted_and_one_of_each_is_shown(tok, tmp_path, capsys):
    """Equal answers were learned: their margin is 0 for ever."""
    answers = [("好", "坏"), ("好", " 好\n"), ("", "坏"), ("好", " "), ("好" * 90, "坏")]
    rows = [{"prompt": "你好", "chosen": a, "rejected": b} for a, b in answers]
    rows.append({"prompt": "问" * 90, "chosen": "好", "rejected": "坏"})
    path = write(tmp_path / "rows.jsonl", rows)
    training, _ = dpo.read_pairs([path], tok, 100, bos=False)
    assert len(training) == 1
    assert capsys.readouterr().out.splitlines() == [
        "dpo: 1 pairs",
        "dpo: dropped 1 whose answers are equal, the first: 你好",
        "dpo: dropped 2 with an empty answer, the first: 你好",
        "dpo: dropped 1 longer than 100 tokens, the first: 你好",
        f"dpo: dropped 1 whose question alone fills 100 tokens, the first: {'问' * 30}…",
    ]
    path = write(tmp_path / "rows.jsonl", rows[1:3])
    with pytest.raises(UserError, match="1 whose answers are equal, 1 with an empty answer"):
        dpo.read_pairs([path], tok, 100, bos=False)


# ---- plain text beside the conversations


def test_plain_text_gets_its_share_of_the_rows_and_all_of_it_is_learned(house, tmp_path):
    cfg = config(house, tmp_path / "out", pretrain_data=f"{house / 'tokens'}:0.25")
    _, tok = load_with_tokenizer(cfg.init_from)
    taught = sft.pack(cfg.data, tok, 128, batch_rows=4, seed=0, bos=False)
    data = sft.with_plain_text(cfg, taught, sft.shares_of_plain_text(cfg))
    documents = TokenSet(house / "tokens", "train", tok)
    texts = {tuple(document[:-1].tolist()) for document in documents}
    plain = 0
    for step in range(5):
        batch = data.batch_at(step)
        ends = batch.cu_seqlens.tolist()
        for begin, end in pairwise(ends):
            if tuple(batch.ids.flatten()[begin:end].tolist()) in texts:
                plain += 1
                assert (batch.targets.flatten()[begin:end] != IGNORE).all()
        rows_of_conversations = (batch.targets == IGNORE).any(1).sum()
        assert rows_of_conversations >= 3
    assert plain >= 5
    assert data.data_id != taught.data_id


def test_an_epoch_is_one_of_the_conversations(house, tmp_path, capsys):
    """Plain text is endless beside them: its rows do not count."""
    few = {"steps": None, "epochs": 4.0}
    for share, expected in ((None, 4), (0.5, 8)):
        mixed = None if share is None else f"{house / 'tokens'}:{share}"
        sft.main(config(house, tmp_path / str(share), pretrain_data=mixed, **few))
        said = capsys.readouterr().out
        rows = json.loads((tmp_path / str(share) / "run.json").read_text())["steps"]
        assert rows % expected == 0
        assert f"sft: {rows} steps of 1 rows = 4.0 epochs" in said


def test_plain_text_goes_with_a_template_that_adds_tokens(house, tmp_path):
    """The shards know the tokenizer without them."""
    cfg = config(
        house, tmp_path / "out", pretrain_data=f"{house / 'tokens'}:0.5", template="chatml"
    )
    model = sft.main(cfg)
    assert model.cfg.eos_token_id == load_with_tokenizer(cfg.out)[1].special_id("<|im_end|>")


@pytest.mark.parametrize("given", ["{}", "{}:1", "{}:0.5,{}2:0.5", "{}:-1", "{}:0"])
def test_plain_text_without_a_share_is_refused(house, tmp_path, given):
    text = given.format(*[house / "tokens"] * 2)
    with pytest.raises(UserError, match=r"say what share|the weight of a source"):
        sft.main(config(house, tmp_path / "out", pretrain_data=text))
    assert not (tmp_path / "out").exists()


def test_the_plain_text_is_not_overwritten(house):
    out = house / "tokens"
    with pytest.raises(UserError, match="--pretrain-data"):
        sft.main(config(house, out, pretrain_data=f"{out}:0.5", overwrite=True))


# ---- --show-batch


class Terminal:
    """Standard output as a terminal has it."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return True


@pytest.mark.parametrize("no_color", ["", "1"])
def test_a_terminal_shows_in_colour_what_is_learned(house, tmp_path, monkeypatch, no_color):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", "xterm")
    sft.main(config(house, tmp_path / "out", show_batch=True))
    begin, end = ("⟦", "⟧") if no_color else ("\x1b[32m", "\x1b[39m")
    assert f"┃ begins a document, {begin}this{end} is learned" in terminal.text
    assert f"┃##提问:\n{QUESTION}\n##回答:\n{begin}{ANSWER}[EOS]{end}" in terminal.text


def test_a_file_gets_plain_marks_and_the_legend(house, tmp_path, capsys):
    run_command(sft.Config, sft.main, [
        "--init-from", str(house / "pretrain"), "--data", str(house / "sft.jsonl"),
        "--out", str(tmp_path / "out"), "--batch-tokens", "128", "--show-batch",
    ])  # fmt: skip
    said = capsys.readouterr().out
    assert "┃ begins a document, ⟦this⟧ is learned, the rest is only read" in said
    assert "\x1b" not in said
    assert not (tmp_path / "out").exists()
    assert torch.is_grad_enabled()
