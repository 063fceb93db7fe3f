"""Pretrain a Phi model from scratch on token shards.

    python pretrain.py --data out/tokens --tokenizer out/tokenizer --out out/pretrain --preset demo --epochs 4

Documents are packed into rows and isolated from each other. Ctrl-C saves; --resume goes on exactly.
"""

from dataclasses import dataclass
from itertools import chain

import torch

from nanophi.cli import flag, run_command
from nanophi.infer.modes import evaluating_aloud
from nanophi.model.config import PRESETS, PhiConfig
from nanophi.model.phi import Phi
from nanophi.text.shards import TokenSet
from nanophi.tokenizer.tokenizer import Tokenizer
from nanophi.train.distributed import computes_in, join
from nanophi.train.loop import TrainConfig, total_steps, train
from nanophi.train.losses import next_token_loss, validation_loss
from nanophi.train.mixture import Mixture, parse_mixture
from nanophi.train.packing import Packed
from nanophi.train.preflight import check_memory
from nanophi.train.rundir import claim


@dataclass(kw_only=True)
class Config(TrainConfig):
    data: str = flag(
        help="token shards, a directory of python -m nanophi.text.shards; or several: news:0.3,poetry:0.1"
    )
    tokenizer: str = flag(help="the tokenizer they were made with")
    batch_tokens: int = flag(
        16384, at_least=1, help="tokens of one optimizer step over all devices"
    )
    preset: str = flag("phi2-chinese-0.2b", help=f"shape of the model: {', '.join(PRESETS)}")
    sample: str | None = flag(
        None, help="a beginning to go on from at each evaluation, so that one sees it learn"
    )
    layers: int | None = flag(None, at_least=1, help="instead of the preset's")
    width: int | None = flag(None, at_least=1, help="hidden_size, instead of the preset's")
    heads: int | None = flag(None, at_least=1, help="attention heads, instead of the preset's")
    mlp: int | None = flag(None, at_least=1, help="width of the MLP, instead of the preset's")


def model_config(cfg: Config, tok: Tokenizer) -> PhiConfig:
    """The preset with the flags' changes; the vocabulary is the tokenizer's, rounded up to a multiple of 64."""
    changes = {
        "hidden_size": cfg.width,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads,
        "intermediate_size": cfg.mlp,
        "max_position_embeddings": cfg.context,
        "vocab_size": -(-len(tok) // 64) * 64,
    }
    return PhiConfig.preset(
        cfg.preset, **{name: value for name, value in changes.items() if value is not None}
    )


def main(cfg: Config) -> Phi:
    claim(cfg)
    tok = Tokenizer.load(cfg.tokenizer)
    shape = model_config(cfg, tok)
    context = shape.max_position_embeddings
    bos = tok.bos_id if cfg.bos else None
    rows = max(cfg.batch_tokens // context, 1)
    mixture = parse_mixture(cfg.data)
    sources = {
        name: Packed(TokenSet(name, "train", tok), context, rows, cfg.seed, bos_id=bos)
        for name in mixture
    }
    data = (
        Mixture(sources, list(mixture.values()), rows)
        if len(sources) > 1
        else next(iter(sources.values()))
    )
    sets = [TokenSet(name, "val", tok) for name in mixture]
    held_out = [
        Packed(documents, context, cfg.micro_batch, cfg.seed, bos_id=bos)
        for documents in sets
        if len(documents) and documents.lengths.max() > 1
    ]
    byte_lengths = tok.byte_lengths()

    def evaluate(model):
        return validation_loss(
            model, chain.from_iterable(part.in_order() for part in held_out), byte_lengths
        )

    steps = total_steps(cfg, data.steps_per_epoch)
    world = join(cfg.device)
    half, shards = computes_in(cfg, world.device) != "float32", world.size if cfg.shard else 1
    at_once = min(cfg.micro_batch, -(-rows // world.size))
    check_memory(
        shape, cfg.optimizer, at_once, context, half, cfg.recompute, world.device, shards
    )  # before it is used
    torch.manual_seed(cfg.seed)
    model = Phi(shape)
    model.set_vocabulary(len(tok))
    if cfg.dropout is not None:
        model.set_dropout(cfg.dropout)
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"pretrain: {parameters:,} parameters, {data.tokens:,} tokens in "
        f"{len(data):,} rows of {context} ({data.padding:.1%} padding, {data.cut_documents:.1%} of the "
        f"documents cut), {steps:,} steps of {rows} rows = "
        f"{steps / data.steps_per_epoch:.1f} epochs -> {cfg.out}"
    )
    if len(sources) > 1:
        print(f"mixture: {data.epochs(steps)}")
    evaluate = evaluate if held_out else None
    if cfg.sample:
        evaluate = evaluating_aloud(evaluate, tok, tok.encode(cfg.sample))
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
