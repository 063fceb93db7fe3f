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
from nanophi.text.shards import TokenSet
from nanophi.tokenizer.chat import chat_prompt, encode_chat
from nanophi.tokenizer.template import check
from nanophi.tokenizer.tokenizer import Tokenizer
from nanophi.train.config import (
    MOST_TOKENS,
    BadRows,
    Dropped,
    TuningConfig,
    context_of,
    total_steps,
)
from nanophi.train.loop import Evaluate, train
from nanophi.train.losses import next_token_loss, validation_loss
from nanophi.train.mixture import Mixture, parse_mixture
from nanophi.train.packing import Packed
from nanophi.train.preflight import fit
from nanophi.train.setup import Setup, begin


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
    pretrain_data: str | None = flag(
        None,
        help="token shards to mix in as plain text, with their share of the rows, against "
        "forgetting: out/tokens:0.1",
    )
    sample: str | None = flag(
        None, help="a question to answer at each evaluation, so that you see the model learn"
    )
    val_data: str | None = flag(None, help="conversations to validate on")


def main(cfg: Config) -> Phi:
    # 1. Check the flags and --out; find the device, the dtype and the ranks.
    plain_text = shares_of_plain_text(cfg)
    setup = begin(cfg, starts_from=cfg.init_from)

    # 2. The pretrained model, and the template that turns a conversation into text.
    model, tok = load_with_tokenizer(cfg.init_from, template=cfg.template)
    if cfg.dropout is not None:
        model.set_dropout(cfg.dropout)
    context = context_of(cfg, model)
    rows = max(cfg.batch_tokens // context, 1)  # of a step
    setup = fit(model.cfg, setup, rows, context, model=model)

    # 3. The data: whole conversations packed into rows. Only answers are targets: the mask comes
    #    from the template.
    taught = pack(cfg.data, tok, context, rows, cfg.seed, cfg.bos, cfg.skip_bad, cfg.learn)
    data = with_plain_text(cfg, taught, plain_text)
    epoch = taught.steps_per_epoch / (1 - sum(plain_text.values()))  # steps that read all of them
    steps = total_steps(cfg, epoch, "--batch-tokens", cfg.batch_tokens)
    evaluate = validation(cfg, tok, context, setup)
    if cfg.sample is not None:
        prompt = chat_prompt(cfg.sample, tok, cfg.bos)
        evaluate = evaluating_aloud(evaluate, tok, prompt)

    # 4. Training: the loss is that of pretraining, on the targets that the mask leaves.
    print(f"sft: {steps:,} steps of {rows} rows = {steps / epoch:.1f} epochs -> {cfg.out}")
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
    """Files of conversations -> packed rows. One that does not fit is dropped whole, because half
    an answer teaches to stop in the middle; so is one without an answer. For those that cannot be
    used see BadRows.
    """
    bad = BadRows()
    dropped = Dropped()
    documents = []
    masks = []
    for messages in read_rows(paths, use=conversation_of, on_bad=bad):
        # Outside of `use`: what goes wrong here is no fault of the row.
        ids, mask = encode_chat(messages, tok, bos)
        if learn == "last":
            mask = last_answer(mask)
        reason = fault_of(messages, mask, context)
        if reason is None:
            documents.append(np.array(ids, dtype=np.int32))
            masks.append(np.array(mask))
        else:
            dropped(reason, messages[0]["content"])
    bad.settle(skip_bad)
    learned = sum(int(mask.sum()) for mask in masks)
    print(f"sft: {len(documents):,} conversations, {learned:,} tokens to learn")
    dropped.tell("sft")
    if not documents:
        raise UserError(
            f"of {len(dropped):,} conversations in {', '.join(paths)} none has an answer and fits "
            f"in a context of {context} tokens: raise --context or shorten them"
        )
    return Packed(documents, context, batch_rows, seed, masks)


def fault_of(messages: list[dict], mask: list[bool], context: int) -> str | None:
    """Why a conversation teaches nothing; None where it can be learned."""
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    if not answers:
        return "without an answer"
    if not all(answer.strip() for answer in answers):
        return "with an empty answer"
    if mask.index(True) >= context:
        return f"whose question alone fills {context} tokens"
    if len(mask) - 1 > context:
        return f"longer than {context} tokens"
    return None


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


def shares_of_plain_text(cfg: Config) -> dict[str, float]:
    """The directories of --pretrain-data and the share of the rows that each gets."""
    if cfg.pretrain_data is None:
        return {}
    given = parse_mixture(cfg.pretrain_data)
    shares = {name: share for name, share in given.items() if share is not None}
    if not shares or sum(shares.values()) >= 1:
        raise UserError(
            f"--pretrain-data {cfg.pretrain_data}: say what share of the rows it gets, below 1 in "
            "all, such as out/tokens:0.1"
        )
    return shares


def with_plain_text(cfg: Config, taught: Packed, shares: dict[str, float]) -> Packed | Mixture:
    """The conversations mixed with plain text, all tokens of which are learned."""
    if not shares:
        return taught
    tok = Tokenizer.load(cfg.init_from)  # without the tokens that --template may have added
    bos_id = tok.bos_id if cfg.bos else None
    sources = {"conversations": taught}
    for name in shares:
        sources[name] = Packed(
            TokenSet(name, "train", tok),
            taught.context,
            taught.batch_rows,
            cfg.seed,
            bos_id=bos_id,
        )
    rest = 1 - sum(shares.values())
    mixture = Mixture(sources, [rest, *shares.values()], taught.batch_rows)
    print(f"sft: {mixture!r} of the rows")
    return mixture


def validation(cfg: Config, tok: Tokenizer, context: int, setup: Setup) -> Evaluate | None:
    """A function of the model: its loss on the answers of --val-data, which the ranks divide. None
    without --val-data.
    """
    if cfg.val_data is None:
        return None
    paths = [cfg.val_data]
    rows = setup.micro_batch
    data = pack(paths, tok, context, rows, cfg.seed, cfg.bos, cfg.skip_bad, cfg.learn)
    byte_lengths = tok.byte_lengths()

    def evaluate(model: Phi) -> dict[str, float]:
        return validation_loss(model, data.in_order(), byte_lengths, setup.world)

    return evaluate


if __name__ == "__main__":
    run_command(Config, main)
