"""Supervised fine-tuning: teach a pretrained model to answer.

    python sft.py --init-from out/pretrain --data sft.jsonl --out out/sft --epochs 3

Rows: {"instruction", "input"?, "output"}, {"prompt", "response"}, {"messages": [...]} or {"conversations": [...]}. The
loss is on the answers and their [EOS] alone.
"""

from dataclasses import dataclass

import numpy as np

from nanophi.cli import UserError, flag, run_command
from nanophi.infer.modes import evaluating_aloud
from nanophi.model.checkpoint import load_with_tokenizer
from nanophi.model.phi import Phi
from nanophi.text.corpus import read_rows
from nanophi.text.schemas import messages_of
from nanophi.tokenizer.chat import chat_prompt, encode_chat
from nanophi.tokenizer.tokenizer import Tokenizer
from nanophi.train.loop import TrainConfig, context_of, total_steps, train
from nanophi.train.losses import next_token_loss, validation_loss
from nanophi.train.packing import Packed
from nanophi.train.rundir import claim


@dataclass(kw_only=True)
class Config(TrainConfig):
    init_from: str = flag(
        help="run directory of pretrain.py, or any Phi checkpoint with a tokenizer"
    )
    data: list[str] = flag(help="conversations: files, directories or globs")
    batch_tokens: int = flag(
        16384, at_least=1, help="tokens of one optimizer step over all devices"
    )
    sample: str | None = flag(
        None, help="a question to answer at each evaluation, so that one sees it learn"
    )
    val_data: str | None = flag(None, help="conversations to validate on")


def pack(
    paths: list[str], tok: Tokenizer, context: int, batch_rows: int, seed: int, bos: bool
) -> Packed:
    """Files of conversations -> packed rows; one without an answer, or too long, is dropped and counted."""
    samples, unanswered, too_long, no_room = [], 0, 0, 0
    for ids, mask in read_rows(paths, use=lambda row: encode_chat(messages_of(row), tok, bos)):
        if not any(mask):
            unanswered += 1
        elif mask.index(True) >= context:
            no_room += 1
        elif len(ids) - 1 > context:
            too_long += 1
        else:
            samples.append((np.array(ids, dtype=np.int32), np.array(mask)))
    learned = sum(int(mask.sum()) for _, mask in samples)
    print(
        f"sft: {len(samples):,} conversations, {learned:,} tokens to learn; dropped {too_long:,} longer than {context} "
        f"tokens, {no_room:,} whose question alone fills them, and {unanswered:,} without an answer"
    )
    if not samples:
        raise UserError(
            f"of {too_long + no_room + unanswered:,} conversations in {', '.join(paths)} none has an answer and fits "
            f"in a context of {context} tokens: raise --context or shorten them"
        )
    documents, masks = zip(*samples, strict=True)
    return Packed(documents, context, batch_rows, seed, masks)


def main(cfg: Config) -> Phi:
    claim(cfg)
    model, tok = load_with_tokenizer(cfg.init_from)
    context = context_of(cfg, model)
    rows = max(cfg.batch_tokens // context, 1)
    data = pack(cfg.data, tok, context, rows, cfg.seed, cfg.bos)
    evaluate = None
    if cfg.val_data:
        validation = pack([cfg.val_data], tok, context, cfg.micro_batch, cfg.seed, cfg.bos)
        byte_lengths = tok.byte_lengths()

        def evaluate(model):
            return validation_loss(model, validation.in_order(), byte_lengths)

    if cfg.sample:
        prompt = chat_prompt([{"role": "user", "content": cfg.sample}], tok, cfg.bos)
        evaluate = evaluating_aloud(evaluate, tok, prompt)
    if cfg.dropout is not None:
        model.set_dropout(cfg.dropout)
    steps = total_steps(cfg, data.steps_per_epoch)
    print(
        f"sft: {steps:,} steps of {rows} rows = {steps / data.steps_per_epoch:.1f} epochs -> {cfg.out}"
    )
    return train(
        model,
        next_token_loss,
        data.batch_at,
        cfg,
        evaluate,
        cfg.resume,
        steps=steps,
        tok=tok,
        data_id=data.data_id,
    )


if __name__ == "__main__":
    run_command(Config, main)
