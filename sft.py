"""Supervised fine-tuning: teach a pretrained model to answer.

    python sft.py --init-from out/pretrain --data sft.jsonl --out out/sft --epochs 3

Rows: {"instruction", "input"?, "output"}, {"prompt", "response"}, {"messages": [...]} or
{"conversations": [...]}. The loss counts only the answers and their [EOS].
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from nanophi.cli import UserError, flag, run_command
from nanophi.infer.samples import evaluating_aloud
from nanophi.model.checkpoint import load_with_tokenizer
from nanophi.model.phi import Phi
from nanophi.text.corpus import read_rows
from nanophi.text.schemas import messages_of
from nanophi.tokenizer.chat import chat_prompt, encode_chat
from nanophi.tokenizer.template import check
from nanophi.tokenizer.tokenizer import Tokenizer
from nanophi.train.config import MOST_TOKENS, BadRows, TuningConfig, context_of, total_steps
from nanophi.train.loop import Evaluate, train
from nanophi.train.losses import next_token_loss, validation_loss
from nanophi.train.packing import Packed
from nanophi.train.preflight import refuse_what_does_not_fit
from nanophi.train.setup import begin


@dataclass(kw_only=True)
class Config(TuningConfig):
    """The flags of this script. Those that all training scripts share are in train/config.py."""

    init_from: str = flag(
        help="run directory of pretrain.py, or any Phi checkpoint with a tokenizer"
    )
    data: list[str] = flag(help="conversations: files, directories or globs")
    batch_tokens: int = flag(
        16384,
        at_least=1,
        at_most=MOST_TOKENS,
        help="tokens of one optimizer step over all devices",
    )
    learn: Literal["all", "last"] = flag("all", help="which answers of a conversation are learned")
    sample: str | None = flag(
        None, help="a question to answer at each evaluation, so that you see the model learn"
    )
    val_data: str | None = flag(None, help="conversations to validate on")


def main(cfg: Config) -> Phi:
    # 1. Check the flags and --out; find the device, the dtype and the ranks.
    setup = begin(cfg, starts_from=cfg.init_from)

    # 2. The pretrained model, and the template that turns a conversation into text.
    model, tok = load_with_tokenizer(cfg.init_from, template=cfg.template)
    if cfg.dropout is not None:
        model.set_dropout(cfg.dropout)
    context = context_of(cfg, model)
    rows = max(cfg.batch_tokens // context, 1)  # of a step
    refuse_what_does_not_fit(model.cfg, setup, rows, context, model=model)

    # 3. The data: whole conversations packed into rows. Only answers are targets: the mask comes
    #    from the template.
    data = pack(cfg.data, tok, context, rows, cfg.seed, cfg.bos, cfg.skip_bad, cfg.learn)
    steps = total_steps(cfg, data.steps_per_epoch, "--batch-tokens", cfg.batch_tokens)
    evaluate = validation(cfg, tok, context)
    if cfg.sample is not None:
        prompt = chat_prompt(cfg.sample, tok, cfg.bos)
        evaluate = evaluating_aloud(evaluate, tok, prompt)

    # 4. Training: the loss is that of pretraining, on the targets that the mask leaves.
    print(
        f"sft: {steps:,} steps of {rows} rows = {steps / data.steps_per_epoch:.1f} epochs "
        f"-> {cfg.out}"
    )
    return train(
        model,
        next_token_loss,
        data.batch_at,
        setup,
        evaluate,
        steps=steps,
        tok=tok,
        data_id=data.data_id,
    )


def conversation_of(row: dict) -> list[dict]:
    """The messages of a row. A UserError where it holds none, or where roles do not take turns."""
    messages = messages_of(row)
    check(messages)
    return messages


def pack(
    paths: list[str],
    tok: Tokenizer,
    context: int,
    batch_rows: int,
    seed: int,
    bos: bool,
    skip_bad: bool = False,
    learn: str = "all",
) -> Packed:
    """Files of conversations -> packed rows. One without an answer, or too long, is dropped and
    counted; for those that cannot be used see BadRows.
    """
    bad = BadRows()
    documents = []
    masks = []
    unanswered = 0
    too_long = 0
    no_room = 0
    for messages in read_rows(paths, use=conversation_of, on_bad=bad):
        # Outside of `use`: what goes wrong here is no fault of the row.
        ids, mask = encode_chat(messages, tok, bos)
        if learn == "last":
            mask = last_answer(mask)
        if not any(mask):
            unanswered += 1
        elif mask.index(True) >= context:
            no_room += 1
        elif len(ids) - 1 > context:
            too_long += 1
        else:
            documents.append(np.array(ids, dtype=np.int32))
            masks.append(np.array(mask))
    bad.settle(skip_bad)
    learned = sum(int(mask.sum()) for mask in masks)
    print(
        f"sft: {len(documents):,} conversations, {learned:,} tokens to learn; dropped {too_long:,} "
        f"longer than {context} tokens, {no_room:,} whose question alone fills them, and "
        f"{unanswered:,} without an answer"
    )
    if not documents:
        raise UserError(
            f"of {too_long + no_room + unanswered:,} conversations in {', '.join(paths)} none has "
            f"an answer and fits in a context of {context} tokens: raise --context or shorten them"
        )
    return Packed(documents, context, batch_rows, seed, masks)


def last_answer(mask: list[bool]) -> list[bool]:
    """The mask of a conversation with its last answer alone.

    >>> last_answer([False, True, True, False, True, False])
    [False, False, False, False, True, False]
    """
    if True not in mask:
        return mask
    end = len(mask) - mask[::-1].index(True)  # behind the last token that is learned
    begin = end
    while begin and mask[begin - 1]:
        begin -= 1
    return [begin <= place < end for place in range(len(mask))]


def validation(cfg: Config, tok: Tokenizer, context: int) -> Evaluate | None:
    """A function of the model: its loss on the answers of --val-data. None without --val-data."""
    if cfg.val_data is None:
        return None
    paths = [cfg.val_data]
    data = pack(paths, tok, context, cfg.micro_batch, cfg.seed, cfg.bos, cfg.skip_bad, cfg.learn)
    byte_lengths = tok.byte_lengths()

    def evaluate(model: Phi) -> dict[str, float]:
        return validation_loss(model, data.in_order(), byte_lengths)

    return evaluate


if __name__ == "__main__":
    run_command(Config, main)
