"""BPE training and encoding beside HF tokenizers on the same documents: are merges and ids identical, and how long?

python bench/bpe.py --input FILES --characters 1000000 --vocab-size 40960

A seeded shuffle of the documents; those after the first N characters are encoded by both to compare the ids.
"""

import json
import random
import time
from dataclasses import dataclass

from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models, normalizers, pre_tokenizers, trainers

from nanophi.cli import flag, run
from nanophi.text.bpe import train_bpe
from nanophi.text.corpus import read_texts
from nanophi.text.tokenizer import SPECIAL_TOKENS


@dataclass(kw_only=True)
class Config:
    input: list[str] = flag(help="documents: files, directories or globs")
    characters: int = flag(1_000_000, help="characters to train on")
    held_out: int = flag(400, help="further documents to encode")
    vocab_size: int = flag(40960, help="tokens")
    min_frequency: int = flag(2, help="a pair that occurs less often is not merged")
    seed: int = flag(0, help="order of the documents")


def train_hf(texts: list[str], cfg: Config, level: str) -> HFTokenizer:
    if level == "byte":
        hf, alphabet = HFTokenizer(models.BPE()), pre_tokenizers.ByteLevel.alphabet()
        hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    else:
        hf, alphabet = HFTokenizer(models.BPE(unk_token="[UNK]")), []
        hf.normalizer = normalizers.NFKC()
        hf.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Punctuation(),
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.Metaspace(prepend_scheme="never"),
            ]
        )
    trainer = trainers.BpeTrainer(
        vocab_size=cfg.vocab_size, min_frequency=cfg.min_frequency, special_tokens=SPECIAL_TOKENS,
        initial_alphabet=alphabet, show_progress=False,
    )  # fmt: skip
    hf.train_from_iterator(texts, trainer)
    return hf


def timed(work) -> tuple[object, float]:
    started = time.monotonic()
    return work(), time.monotonic() - started


def main(cfg: Config) -> None:
    documents = list(read_texts(cfg.input))
    random.Random(cfg.seed).shuffle(documents)
    texts, left = [], cfg.characters
    while left > 0 and documents:
        texts.append(documents.pop()[:left])
        left -= len(texts[-1])
    held_out = documents[: cfg.held_out]
    print(f"{sum(map(len, texts)):,} characters in {len(texts):,} documents; {len(held_out):,} others to encode\n")
    print(
        "| level | merges | identical | ids of the others | identical | train s, ours and HF | encode s, ours and HF |"
    )
    print("|---|---|---|---|---|---|---|")
    for level in ("byte", "char"):
        ours, ours_s = timed(lambda level=level: train_bpe(texts, cfg.vocab_size, cfg.min_frequency, level))
        theirs, theirs_s = timed(lambda level=level: train_hf(texts, cfg, level))
        merges, vocab = (json.loads(theirs.to_str())["model"][part] for part in ("merges", "vocab"))
        model = ours.to_dict()["model"]
        same = model["merges"] == merges and model["vocab"] == vocab
        theirs.encode_special_tokens = True
        ids, encode_s = timed(lambda ours=ours: ours.encode_batch(held_out))
        theirs_ids, their_encode_s = timed(
            lambda theirs=theirs: [e.ids for e in theirs.encode_batch(held_out, add_special_tokens=False)]
        )
        print(
            f"| {level} | {len(merges):,} | {'yes' if same else 'NO'} | {sum(map(len, ids)):,} | "
            f"{'yes' if ids == theirs_ids else 'NO'} | {ours_s:.1f}, {theirs_s:.1f} | "
            f"{encode_s:.1f}, {their_encode_s:.1f} |"
        )


if __name__ == "__main__":
    run(Config, main)
