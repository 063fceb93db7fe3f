"""Train a BPE tokenizer on clean text.

python train_tokenizer.py --input clean.jsonl --out out/tokenizer --vocab-size 8192

Byte level is lossless on any text. Char level makes full-width letters narrow, digits and punctuation tokens of their
own, and of a character that the text lacks [UNK], or with --byte-fallback its bytes.
"""

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nanophi.cli import Progress, UserError, flag, peak_memory_gb, run_command
from nanophi.text.corpus import Reading, Skipped
from nanophi.text.schemas import text_of
from nanophi.text.share import in_share
from nanophi.text.stats import draw_lengths, report, write_vocabulary
from nanophi.tokenizer.bpe import train_bpe
from nanophi.tokenizer.pieces import train_sentencepiece

# GB that n characters of Chinese take: BASE + FACTOR * n^POWER, measured from 1 to 100 million and a tenth added.
BASE, FACTOR, POWER = 0.2, 1.55e-5, 0.62
OWN_CHOICES = ("byte", "gpt2", 2, False)  # defaults of what --trainer sentencepiece decides itself
REPORT_SHARE, REPORT_CHARACTERS = 0.05, 500_000  # of the training text, where no other is named


@dataclass(kw_only=True)
class Config(Reading):
    out: str = flag(help="directory for tokenizer.json and its companions")
    vocab_size: int = flag(
        40960, help="tokens, the 7 special ones and the bytes or characters among them"
    )
    level: Literal["byte", "char"] = flag(
        "byte", help="what merges start from: bytes or characters"
    )
    trainer: Literal["bpe", "sentencepiece"] = flag(
        "bpe", help="sentencepiece: its BPE over characters"
    )
    split: Literal["gpt2", "qwen2"] = flag(
        "gpt2", help="byte level: how text becomes words; qwen2 has digits alone"
    )
    byte_fallback: bool = flag(
        False, help="char level: a character that the text lacks becomes its bytes, not [UNK]"
    )
    min_frequency: int = flag(2, help="a pair that occurs less often is not merged")
    held_out: list[str] | None = flag(
        None, help="texts to report on (default: a sample of the training text)"
    )
    report: bool = flag(
        True, help="say how well the tokenizer serves, by script, and draw its tokens' lengths"
    )
    max_memory: float | None = flag(
        None, above=0.3, help="GB; a text that may need more is sampled, by documents"
    )


def share_that_fits(cfg: Config) -> float:
    """The share of the documents that --max-memory lets in; all texts are read once to know their size."""
    if cfg.max_memory is None:
        return 1.0
    characters = sum(map(len, cfg.rows(Skipped(), text_of)))
    share = min(((cfg.max_memory - BASE) / FACTOR) ** (1 / POWER) / max(characters, 1), 1.0)
    print(
        f"tokenizer: {share:.1%} of the documents ({characters:,} characters) will fit in {cfg.max_memory} GB"
    )
    return share


def main(cfg: Config) -> dict:
    if cfg.level == "char" and cfg.split != "gpt2":
        raise UserError("--split is for --level byte: the char level has one split of its own")
    if (
        cfg.trainer == "sentencepiece"
        and (cfg.level, cfg.split, cfg.min_frequency, cfg.byte_fallback) != OWN_CHOICES
    ):
        raise UserError(
            "--trainer sentencepiece decides level, split, frequency and fallback itself: leave out those flags"
        )
    skipped = Skipped()
    held_out = (
        list(cfg.rows(skipped, text_of, cfg.held_out)) if cfg.held_out else None
    )  # before long work
    share = share_that_fits(cfg)
    started, characters, sample = time.monotonic(), 0, []

    def counted():
        nonlocal characters
        with Progress("documents", None) as bar:
            for text in cfg.rows(skipped, text_of):
                bar.update()
                if share < 1 and not in_share(f"sample {text}", share):  # by a hash of the text
                    continue
                characters += len(text)
                if in_share(text, REPORT_SHARE) and sum(map(len, sample)) < REPORT_CHARACTERS:
                    sample.append(text)
                yield text

    if cfg.trainer == "sentencepiece":
        tok = train_sentencepiece(counted(), cfg.vocab_size, Path(cfg.out) / "sentencepiece.model")
    else:
        tok = train_bpe(
            counted(), cfg.vocab_size, cfg.min_frequency, cfg.level, cfg.byte_fallback, cfg.split
        )
    seconds = time.monotonic() - started
    tok.save(cfg.out)
    write_vocabulary(tok, Path(cfg.out) / "vocab.tsv")
    if len(tok) < cfg.vocab_size:
        print(
            f"tokenizer: the text gave {len(tok):,} of {cfg.vocab_size:,} tokens: no other pair of tokens occurs "
            f"{cfg.min_frequency} times"
            if cfg.trainer == "bpe"
            else f"tokenizer: the text gave {len(tok):,} of {cfg.vocab_size:,} tokens"
        )
    print(
        f"{skipped}tokenizer: read {characters:,} characters, skipped {skipped.count:,} bad rows, learned "
        f"{len(tok.merge_list):,} merges, {len(tok):,} tokens, in {seconds:.1f} s, peak {peak_memory_gb():.2f} GB; "
        f"wrote {cfg.out}"
    )
    if cfg.report:
        read, whence = (
            (sample, "of the training text") if held_out is None else (held_out, "held out")
        )
        print(f"\non {sum(map(len, read)):,} characters {whence}:\n{report(tok, read)}")
        with contextlib.suppress(ImportError):  # matplotlib is an extra
            draw_lengths(tok, Path(cfg.out) / "lengths.png")
    return {"tokens": len(tok), "characters": characters}


if __name__ == "__main__":
    run_command(Config, main)
