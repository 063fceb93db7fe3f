"""Are merges and ids those of HF tokenizers? Trained on the same documents, then both encode others.

python bench/bpe.py --input DIR --characters 1000000 --min-frequency 2 100

A seeded shuffle of the documents; lines of those after the first N characters are encoded by both. Speed and memory
are in bpe_training.py and encoding.py.
"""

import json
from dataclasses import dataclass
from itertools import islice

from sample import shuffled, take
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from nanophi.cli import flag, run_command
from nanophi.tokenizer.bpe import train_bpe
from nanophi.tokenizer.levels import QWEN2_SPLIT
from nanophi.tokenizer.tokenizer import SPECIAL_TOKENS


@dataclass(kw_only=True)
class Config:
    input: list[str] = flag(help="documents: files, directories or globs")
    characters: int = flag(1_000_000, help="characters to train on")
    lines: int = flag(100_000, help="lines of other documents to encode")
    vocab_size: int = flag(40960, help="tokens")
    min_frequency: list[int] = flag(
        help="a pair that occurs less often is not merged; one training for each"
    )
    seed: int = flag(0, help="order of the documents")


def hf_tokenizer(kind: str) -> HFTokenizer:
    if kind == "char":
        hf = HFTokenizer(models.BPE(unk_token="[UNK]"))
        hf.normalizer = normalizers.NFKC()
        alone = [pre_tokenizers.Punctuation(), pre_tokenizers.Digits(individual_digits=True)]
        hf.pre_tokenizer = pre_tokenizers.Sequence(
            [*alone, pre_tokenizers.Metaspace(prepend_scheme="never")]
        )
        return hf
    hf = HFTokenizer(models.BPE())
    if kind == "gpt2":
        hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    else:
        split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        hf.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    return hf


def main(cfg: Config) -> None:
    documents = shuffled(cfg.input, cfg.seed)
    texts = take(documents, cfg.characters)
    lines = list(
        islice((line for text in documents for line in text.splitlines(keepends=True)), cfg.lines)
    )
    print(
        f"{sum(map(len, texts)):,} characters in {len(texts):,} documents; {len(lines):,} other lines\n"
    )
    print(
        "| split | min. frequency | merges | as HF's | ids of the other lines | as HF's |\n|---|---|---|---|---|---|"
    )
    for kind, options in (("gpt2", {}), ("qwen2", {"split": "qwen2"}), ("char", {"level": "char"})):
        for min_frequency in cfg.min_frequency:
            ours, hf = (
                train_bpe(texts, cfg.vocab_size, min_frequency, **options),
                hf_tokenizer(kind),
            )
            alphabet = [] if kind == "char" else pre_tokenizers.ByteLevel.alphabet()
            trainer = trainers.BpeTrainer(
                vocab_size=cfg.vocab_size, min_frequency=min_frequency, special_tokens=SPECIAL_TOKENS,
                initial_alphabet=alphabet, show_progress=False,
            )  # fmt: skip
            hf.train_from_iterator(texts, trainer)
            theirs, model = json.loads(hf.to_str())["model"], ours.to_dict()["model"]
            same = all(model[part] == theirs[part] for part in ("merges", "vocab"))
            hf.encode_special_tokens = True
            ids = ours.encode_batch(lines)
            same_ids = ids == [
                found.ids for found in hf.encode_batch(lines, add_special_tokens=False)
            ]
            print(
                f"| {kind} | {min_frequency} | {len(theirs['merges']):,} | {'yes' if same else 'NO'} | "
                f"{sum(map(len, ids)):,} | {'yes' if same_ids else 'NO'} |",
                flush=True,
            )


if __name__ == "__main__":
    run_command(Config, main)
