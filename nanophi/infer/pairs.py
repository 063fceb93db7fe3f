"""Preference pairs as the original project made them: an early checkpoint writes what is rejected.

    python sft.py ... --out out/sft --keep-at 0.5     leaves the half-taught model in out/sft-early
    python -m nanophi.infer.pairs --model out/sft-early --data sft.jsonl --out pairs.jsonl

    sft.jsonl ─ questions_of ─> (prompt, chosen)
                                 prompt ─ early model ─> rejected
                                (prompt, chosen, rejected) ─ fault ─> a row, or dropped and counted

A pair teaches nothing where both answers are nearly the same: it is dropped where they are more
similar than 0.9.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import SequenceMatcher

from nanophi.claims import claim
from nanophi.cli import UserError, flag, run_command
from nanophi.infer.answers import answer_all
from nanophi.infer.generate import fits
from nanophi.model.checkpoint import load_with_tokenizer
from nanophi.text.corpus import expand, read_rows, write_rows
from nanophi.text.outputs import rows_output
from nanophi.text.schemas import messages_of
from nanophi.tokenizer.chat import chat_prompt
from nanophi.tokenizer.template import template_flag

# ---- which pairs teach something


def similarity(a: str, b: str) -> float:
    """0 (nothing in common) to 1 (equal): twice the matched characters over all characters of both.

    Three characters match, of four and four: 2 * 3 / (4 + 4).

    >>> similarity("甲乙丙丁", "甲乙丙戊")
    0.75

    `autojunk` is off: with it, difflib ignores a character that is common in a long answer, such
    as 的, and two long answers that are nearly equal would count as different.
    """
    return SequenceMatcher(None, a, b, autojunk=False).ratio()


def fault(chosen: str, rejected: str, threshold: float) -> str | None:
    """Why a pair is useless: "empty", "equal" or "similar"; None where it is useful.

    >>> fault("多喝水，早点休息。", "多喝水，早点睡觉。", threshold=0.7)
    'similar'
    """
    if not chosen.strip() or not rejected.strip():
        return "empty"
    if chosen == rejected:
        return "equal"
    if similarity(chosen, rejected) > threshold:
        return "similar"
    return None


# ---- questions -> answers -> pairs


def questions_of(row: dict) -> tuple[str, str]:
    """(prompt, chosen) of a conversation's first turn, or of a row that has these two fields.

    >>> questions_of({"instruction": "你是谁？", "output": "小助手。"})
    ('你是谁？', '小助手。')
    """
    if "prompt" in row and "chosen" in row:
        return row["prompt"], row["chosen"]
    messages = [message for message in messages_of(row) if message["role"] != "system"]
    if len(messages) < 2:
        raise UserError("a conversation without an answer gives no pair")
    if [message["role"] for message in messages[:2]] != ["user", "assistant"]:
        raise UserError("a conversation gives a pair if it begins with user and assistant")
    return messages[0]["content"], messages[1]["content"]


def make_pairs(
    questions: Iterable[tuple[str, str]], answers: Iterable[str], threshold: float
) -> tuple[list[dict], Counter]:
    """(prompt, chosen) and rejected answers -> preference rows, and how many had which fault."""
    rows = []
    dropped: Counter[str] = Counter()
    for (prompt, chosen), rejected in zip(questions, answers, strict=True):
        reason = fault(chosen, rejected, threshold)
        if reason is None:
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        else:
            dropped[reason] += 1
    return rows, dropped


# ---- the command


@dataclass(kw_only=True)
class Config:
    model: str = flag(
        help="the checkpoint whose answers are rejected, sft.py's --keep-at leaves one"
    )
    data: list[str] = flag(help="conversations (their first turns), or rows with prompt and chosen")
    out: str = flag(help="the .jsonl of {prompt, chosen, rejected} to write")
    similar: float = flag(0.9, above=0, help="a pair more similar than this is dropped")
    batch: int = flag(16, at_least=1, help="prompts answered at once")
    max_new_tokens: int = flag(200, at_least=1, help="longest rejected answer")
    template: str | None = template_flag()
    device: str = flag("auto", help="auto: cuda where there is one, else cpu")


def main(cfg: Config) -> dict:
    """Answer every prompt and write the pairs; returns the counts it prints."""
    with claim(expand(cfg.data), rows_output("--out", cfg.out)):
        return write_pairs(cfg)


def write_pairs(cfg: Config) -> dict:
    """`main`, while nobody else writes the output."""
    # 1. questions that the model can read
    questions = list(read_rows(cfg.data, use=questions_of))
    if not questions:
        raise UserError(f"no conversation in {', '.join(cfg.data)}")
    model, tok = load_with_tokenizer(cfg.model, cfg.device, cfg.template)
    context = model.cfg.max_position_embeddings
    fitting = [pair for pair in questions if fits(model, chat_prompt(pair[0], tok))]

    # 2. rejected answers
    prompts = [prompt for prompt, _ in fitting]
    answers = answer_all(model, tok, prompts, cfg.batch, cfg.max_new_tokens)
    rejected = (answer.text for answer in answers)

    # 3. pairs
    rows, dropped = make_pairs(fitting, rejected, cfg.similar)
    reasons = ", ".join(f"{dropped[reason]:,} {reason}" for reason in ("similar", "equal", "empty"))
    if len(fitting) < len(questions):
        dropped["long"] = len(questions) - len(fitting)
        reasons += f", {dropped['long']:,} longer than the context of {context} tokens"
    if not rows:
        raise UserError(
            f"no pair is left ({reasons}): take an earlier checkpoint, sft.py --keep-at 0.125 say"
        )
    write_rows(cfg.out, rows)
    print(
        f"pairs: {len(questions):,} answers of {cfg.model}; dropped {reasons}; "
        f"wrote {len(rows):,} pairs to {cfg.out}"
    )
    return {"prompts": len(questions), "pairs": len(rows)} | dropped


if __name__ == "__main__":
    run_command(Config, main)
