"""Are merges and ids those of HF tokenizers? Both are trained on the same documents, then both
encode others.

    python bench/bpe.py --input DIR --characters 1000000 --min-frequency 2 100

The documents are shuffled by a seed. Training takes the first N characters; the lines of the
documents behind them are encoded. Speed and memory are in bpe_training.py and encoding.py.
"""

import json
from dataclasses import dataclass
from itertools import islice

from sample import shuffled, take
from table import print_head, print_row
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from nanophi.cli import flag, run_command
from nanophi.tokenizer.bpe import train_bpe
from nanophi.tokenizer.splits import QWEN2_SPLIT
from nanophi.tokenizer.tokenizer import SPECIAL_TOKENS

# Name -> arguments of train_bpe.
KINDS = {"gpt2": {}, "qwen2": {"split": "qwen2"}, "char": {"level": "char"}}


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


def main(cfg: Config) -> None:
    documents = shuffled(cfg.input, cfg.seed)
    texts = take(documents, cfg.characters)
    lines = first_lines(documents, cfg.lines)
    characters = sum(map(len, texts))
    print(f"{characters:,} characters in {len(texts):,} documents; {len(lines):,} other lines\n")
    print_head("split", "min. frequency", "merges", "as HF's", "ids of the other lines", "as HF's")
    for kind in KINDS:
        for min_frequency in cfg.min_frequency:
            cells = compare(kind, texts, lines, cfg.vocab_size, min_frequency)
            print_row(kind, str(min_frequency), *cells)


def first_lines(documents: list[str], count: int) -> list[str]:
    """The first lines of the documents, with their line breaks."""
    lines = (line for text in documents for line in text.splitlines(keepends=True))
    return list(islice(lines, count))


def compare(
    kind: str, texts: list[str], lines: list[str], vocab_size: int, min_frequency: int
) -> list[str]:
    """The cells of a row: merges, whether they are HF's, ids of `lines`, whether they are HF's."""
    ours = train_bpe(texts, vocab_size, min_frequency, **KINDS[kind])
    hf = hf_tokenizer(kind)
    hf.train_from_iterator(texts, hf_trainer(kind, vocab_size, min_frequency))
    hf.encode_special_tokens = True

    our_model = ours.to_dict()["model"]
    hf_model = json.loads(hf.to_str())["model"]
    same_model = all(our_model[part] == hf_model[part] for part in ("merges", "vocab"))
    our_ids = ours.encode_batch(lines)
    hf_ids = [encoding.ids for encoding in hf.encode_batch(lines, add_special_tokens=False)]
    return [
        f"{len(hf_model['merges']):,}",
        yes_or_no(same_model),
        f"{sum(map(len, our_ids)):,}",
        yes_or_no(our_ids == hf_ids),
    ]


def yes_or_no(same: bool) -> str:
    return "yes" if same else "NO"


def hf_tokenizer(kind: str) -> HFTokenizer:
    """An untrained HF tokenizer that cuts text as ours does."""
    if kind == "char":
        hf = HFTokenizer(models.BPE(unk_token="[UNK]"))
        hf.normalizer = normalizers.NFKC()
        hf.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Punctuation(),
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.Metaspace(prepend_scheme="never"),
            ]
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


def hf_trainer(kind: str, vocab_size: int, min_frequency: int) -> trainers.BpeTrainer:
    """HF's trainer. On the byte level all 256 bytes are tokens, whether they occur or not."""
    alphabet = [] if kind == "char" else pre_tokenizers.ByteLevel.alphabet()
    return trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=alphabet,
        show_progress=False,
    )


if __name__ == "__main__":
    run_command(Config, main)
