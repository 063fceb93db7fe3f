"""Train a BPE tokenizer on clean text.

    python train_tokenizer.py --input clean.jsonl --out out/tokenizer --vocab-size 8192

Byte level is lossless on any text. Char level makes full-width letters narrow and digits and
punctuation tokens of their own; a character that the text lacks becomes [UNK], or with
--byte-fallback its bytes.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nanophi.claims import Output, claim
from nanophi.cli import Progress, UserError, flag, peak_memory_gb, run_command
from nanophi.files import MODEL_NAMES, TOKENIZER_NAMES, together
from nanophi.text.corpus import Reading, Skipped, expand
from nanophi.text.schemas import text_of
from nanophi.text.share import in_share
from nanophi.tokenizer.bpe import train_bpe
from nanophi.tokenizer.elsewhere import train_sentencepiece
from nanophi.tokenizer.report import draw_lengths, report, write_vocabulary
from nanophi.tokenizer.splits import SPLITS
from nanophi.tokenizer.tokenizer import Tokenizer

FILES = (*TOKENIZER_NAMES, "lengths.png", "sentencepiece.model")  # in --out


@dataclass(kw_only=True)
class Config(Reading):
    out: str = flag(help="directory for tokenizer.json and its companions")
    vocab_size: int = flag(
        40960,
        at_least=1,
        at_most=10_000_000,
        help="tokens, the 7 special ones and the bytes or characters among them",
    )
    level: Literal["byte", "char"] = flag(
        "byte", help="what merges start from: bytes or characters"
    )
    trainer: Literal["bpe", "sentencepiece"] = flag(
        "bpe", help="sentencepiece: its BPE over characters"
    )
    split: str = flag(
        "gpt2",
        choices=SPLITS,
        help="byte level: how text becomes words; qwen2 keeps digits single",
    )
    byte_fallback: bool = flag(
        False, help="char level: a character that the text lacks becomes its bytes, not [UNK]"
    )
    special_tokens: list[str] | None = flag(
        None, help="special tokens beside the 7, such as those of a chat template"
    )
    min_frequency: int = flag(2, at_least=1, help="a pair that occurs less often is not merged")
    held_out: list[str] | None = flag(
        None, help="texts to report on (default: a sample of the training text)"
    )
    report: bool = flag(
        True, help="say how well the tokenizer serves, by script, and draw its tokens' lengths"
    )
    max_memory: float | None = flag(
        None, above=0.3, help="GB; a text that may need more is sampled, by documents"
    )
    overwrite: bool = flag(False, help="replace the tokenizer that --out holds")


def main(cfg: Config) -> dict[str, int]:
    """Train and save; returns the numbers of tokens and of characters read."""
    # 1. The flags fit together, and --out may be written.
    refuse_contradictions(cfg)
    inputs = cfg.files(cfg.out)
    held_out = cfg.held_out or []
    out = Output("--out", cfg.out, folder=True, files=FILES, foreign=tuple(MODEL_NAMES))
    with claim([*inputs, *expand(held_out)], out):
        refuse_another_tokenizer(cfg)
        return learn(cfg, inputs)


def learn(cfg: Config, inputs: list[Path]) -> dict[str, int]:
    # 2. The text. What is held out is read first: a mistake there shows before the long work.
    skipped = Skipped()
    held_out = None
    if cfg.held_out:
        held_out = list(cfg.rows(skipped, text_of, cfg.held_out))
    texts = TrainingText(cfg, inputs, skipped, share_that_fits(cfg, inputs))

    # 3. Training. What is kept: tokenizer.json and its companions, and a table to read.
    out = Path(cfg.out)
    started = time.monotonic()
    with together(out):
        tok = train(cfg, texts)
        tok.add_tokens(cfg.special_tokens or [], special=True)
        seconds = time.monotonic() - started
        tok.save(out)
        write_vocabulary(tok, out / "vocab.tsv")
    say_what_was_learned(cfg, tok, texts, seconds)

    # 4. How well it serves.
    if cfg.report:
        if held_out is None:
            say_how_it_serves(tok, texts.sample, "of the training text", out)
        else:
            say_how_it_serves(tok, held_out, "held out", out)
    return {"tokens": len(tok), "characters": texts.characters}


def refuse_another_tokenizer(cfg: Config) -> None:
    """Shards and models of another tokenizer would no longer be understood."""
    if (Path(cfg.out) / "tokenizer.json").exists() and not cfg.overwrite:
        raise UserError(
            f"--out {cfg.out} holds a tokenizer, with which shards or models may have been made: "
            "name another directory, or replace it with --overwrite"
        )


def refuse_contradictions(cfg: Config) -> None:
    if cfg.level == "char" and cfg.split != "gpt2":
        raise UserError("--split is for --level byte: the char level has one split of its own")
    defaults = {"level": "byte", "split": "gpt2", "min_frequency": 2, "byte_fallback": False}
    given = any(getattr(cfg, name) != default for name, default in defaults.items())
    if cfg.trainer == "sentencepiece" and given:
        raise UserError(
            "--trainer sentencepiece decides level, split, frequency and fallback itself: leave "
            "out those flags"
        )


# GB that n characters of Chinese take: BASE + FACTOR * n^POWER. It was measured from 1 to 100
# million characters, and a tenth was added.
BASE = 0.2
FACTOR = 1.55e-5
POWER = 0.62


def share_that_fits(cfg: Config, inputs: list[Path]) -> float:
    """The share of the documents that --max-memory lets in; all texts are read once to know their
    size.
    """
    if cfg.max_memory is None:
        return 1.0
    characters = sum(map(len, cfg.rows(Skipped(), text_of, inputs)))
    fits = ((cfg.max_memory - BASE) / FACTOR) ** (1 / POWER)
    share = min(fits / max(characters, 1), 1.0)
    print(
        f"tokenizer: {share:.1%} of the documents ({characters:,} characters) will fit in "
        f"{cfg.max_memory} GB"
    )
    return share


REPORT_SHARE = 0.05  # of the training text, where no other text is named
REPORT_CHARACTERS = 500_000


class TrainingText:
    """The texts to train on, read once; it counts their characters and keeps a sample for the
    report.
    """

    def __init__(self, cfg: Config, inputs: list[Path], skipped: Skipped, share: float):
        self.cfg = cfg
        self.inputs = inputs
        self.skipped = skipped  # bad rows
        self.share = share  # of the documents that are taken
        self.characters = 0
        self.sample: list[str] = []
        self.sample_characters = 0

    def __iter__(self) -> Iterator[str]:
        with Progress("documents", None) as bar:
            for text in self.cfg.rows(self.skipped, text_of, self.inputs):
                bar.update()
                if self.share < 1 and not in_share(f"sample {text}", self.share):
                    continue
                self.characters += len(text)
                if in_share(text, REPORT_SHARE) and self.sample_characters < REPORT_CHARACTERS:
                    self.sample.append(text)
                    self.sample_characters += len(text)
                yield text


def train(cfg: Config, texts: TrainingText) -> Tokenizer:
    vocab_size = cfg.vocab_size - len(cfg.special_tokens or [])
    if cfg.trainer == "sentencepiece":
        return train_sentencepiece(texts, vocab_size, Path(cfg.out) / "sentencepiece.model")
    return train_bpe(texts, vocab_size, cfg.min_frequency, cfg.level, cfg.byte_fallback, cfg.split)


def say_what_was_learned(cfg: Config, tok: Tokenizer, texts: TrainingText, seconds: float) -> None:
    if len(tok) < cfg.vocab_size:
        reason = ""
        if cfg.trainer == "bpe":
            reason = f": no other pair of tokens occurs {cfg.min_frequency} times"
        print(f"tokenizer: the text gave {len(tok):,} of {cfg.vocab_size:,} tokens{reason}")
    print(
        f"{texts.skipped}tokenizer: read {texts.characters:,} characters, skipped "
        f"{texts.skipped.count:,} bad rows, learned {len(tok.merge_list):,} merges, "
        f"{len(tok):,} tokens, in {seconds:.1f} s, peak {peak_memory_gb():.2f} GB; "
        f"wrote {cfg.out}"
    )


def say_how_it_serves(tok: Tokenizer, texts: list[str], origin: str, out: Path) -> None:
    """Print the report on these texts, and draw the lengths of the tokens where matplotlib is
    installed.
    """
    print(f"\non {sum(map(len, texts)):,} characters {origin}:\n{report(tok, texts)}")
    with contextlib.suppress(ImportError):
        draw_lengths(tok, out / "lengths.png")


if __name__ == "__main__":
    run_command(Config, main)
