"""Pretrain a Phi model from scratch on token shards.

    python pretrain.py --data out/tokens --tokenizer out/tokenizer --out out/pretrain \\
        --preset demo --epochs 4

The model learns to predict the next token of documents. They are packed into rows and isolated from
each other. Ctrl-C saves the run, and --resume goes on exactly.
"""

from dataclasses import dataclass
from itertools import chain

import torch

from nanophi.cli import flag, run_command
from nanophi.infer.samples import evaluating_aloud
from nanophi.model.config import PRESETS, PhiConfig
from nanophi.model.phi import Phi
from nanophi.text.shards import TokenSet
from nanophi.tokenizer.tokenizer import Tokenizer
from nanophi.train.config import MOST_TOKENS, TrainConfig, total_steps
from nanophi.train.loop import Evaluate, train
from nanophi.train.losses import next_token_loss, validation_loss
from nanophi.train.mixture import Mixture, parse_mixture
from nanophi.train.packing import Packed
from nanophi.train.preflight import fit, tokens_of_a_step
from nanophi.train.setup import Setup, begin


@dataclass(kw_only=True)
class Config(TrainConfig):
    """The flags of this script. Those that all training scripts share are in train/config.py."""

    data: str = flag(
        help="token shards, a directory of python -m nanophi.text.shards; or several: "
        "news:0.3,poetry:0.1"
    )
    tokenizer: str = flag(help="the tokenizer they were made with")
    batch_tokens: int | None = flag(
        None,
        at_least=1,
        at_most=MOST_TOKENS,
        help="tokens of one optimizer step over all devices (default: 16,384; on GPUs, for more "
        "than 100 M parameters, 131,072)",
    )
    preset: str = flag("phi2-chinese-0.2b", help=f"shape of the model: {', '.join(PRESETS)}")
    sample: str | None = flag(
        None, help="a text to continue at each evaluation, so that you see the model learn"
    )
    layers: int | None = flag(None, at_least=1, at_most=1000, help="instead of the preset's")
    width: int | None = flag(
        None, at_least=1, at_most=2**20, help="hidden_size, instead of the preset's"
    )
    heads: int | None = flag(
        None, at_least=1, at_most=2**20, help="attention heads, instead of the preset's"
    )
    mlp: int | None = flag(
        None, at_least=1, at_most=2**24, help="width of the MLP, instead of the preset's"
    )


# The recipe. To go deeper, read what it calls:
#
#     train/packing.py    documents -> rows -> the batch of a step
#     model/phi.py        the network
#     train/losses.py     the loss of the next token
#     train/loop.py       the training loop; train/step.py is one step of it


def main(cfg: Config) -> Phi:
    # 1. Check the flags and --out; find the device, the dtype and the ranks.
    setup = begin(cfg)

    # 2. The shape of the model: a preset, changed by flags. A row holds as many tokens as the model
    #    has positions, and a step as many rows as --batch-tokens fill.
    tok = Tokenizer.load(cfg.tokenizer)
    shape = model_config(cfg, tok)
    context = shape.max_position_embeddings
    batch_tokens = cfg.batch_tokens or tokens_of_a_step(shape, setup.world)
    rows = max(batch_tokens // context, 1)  # of a step
    setup = fit(shape, setup.changed(batch_tokens=batch_tokens), rows, context)

    # 3. The data: documents packed into rows. `data.batch_at(step)` gives the batch of a step, and
    #    `evaluate(model)` the loss on documents that were held out.
    data = training_data(cfg, tok, context, rows)
    steps = total_steps(cfg, data.steps_per_epoch, "--batch-tokens", batch_tokens)
    evaluate = validation(cfg, tok, context, setup)
    if cfg.sample is not None:
        evaluate = evaluating_aloud(evaluate, tok, tok.encode(cfg.sample))

    # 4. The model, with random weights: its first loss is about ln(vocab_size). Ids that the
    #    tokenizer does not use are made impossible.
    torch.manual_seed(cfg.seed)
    model = Phi(shape)
    model.set_vocabulary(len(tok))
    if cfg.dropout is not None:
        model.set_dropout(cfg.dropout)

    # 5. Training: --out holds the model, its history in metrics.jsonl, and all that --resume needs.
    print(
        f"pretrain: {model.num_parameters():,} parameters, {data.tokens:,} tokens in "
        f"{len(data):,} rows of {context} ({data.padding:.1%} padding, {data.cut_documents:.1%} "
        f"of the documents cut), {steps:,} steps of {rows} rows = "
        f"{steps / data.steps_per_epoch:.1f} epochs -> {cfg.out}"
    )
    if isinstance(data, Mixture):
        print(f"mixture: {data.epochs(steps)}")
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


def model_config(cfg: Config, tok: Tokenizer) -> PhiConfig:
    """The preset with the changes of the flags. The vocabulary is the tokenizer's, rounded up to a
    multiple of 64.
    """
    changes = {
        "hidden_size": cfg.width,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads,
        "intermediate_size": cfg.mlp,
        "max_position_embeddings": cfg.context,
    }
    given = {name: value for name, value in changes.items() if value is not None}
    vocab_size = -(-len(tok) // 64) * 64
    eos = tok.eos_id  # a vocabulary from elsewhere has its own
    return PhiConfig.preset(cfg.preset, **given, vocab_size=vocab_size, eos_token_id=eos)


def training_data(cfg: Config, tok: Tokenizer, context: int, rows: int) -> Packed | Mixture:
    """The documents of --data in rows of `context` tokens, `rows` of them a step; several sources
    by their shares.
    """
    weights = parse_mixture(cfg.data)
    bos_id = tok.bos_id if cfg.bos else None
    sources = {
        name: Packed(TokenSet(name, "train", tok), context, rows, cfg.seed, bos_id=bos_id)
        for name in weights
    }
    if len(sources) == 1:
        return sources.popitem()[1]
    return Mixture(sources, list(weights.values()), rows)


def validation(cfg: Config, tok: Tokenizer, context: int, setup: Setup) -> Evaluate | None:
    """A function of the model: its loss on the held-out documents of all sources, which the
    ranks divide. None where nothing is held out.
    """
    bos_id = tok.bos_id if cfg.bos else None
    packed = []
    for name in parse_mixture(cfg.data):
        documents = TokenSet(name, "val", tok)
        if len(documents) and documents.lengths.max() > 1:
            packed.append(Packed(documents, context, setup.micro_batch, cfg.seed, bos_id=bos_id))
    if not packed:
        return None
    byte_lengths = tok.byte_lengths()

    def evaluate(model: Phi) -> dict[str, float]:
        batches = chain.from_iterable(part.in_order() for part in packed)
        return validation_loss(model, batches, byte_lengths, setup.world)

    return evaluate


if __name__ == "__main__":
    run_command(Config, main)
