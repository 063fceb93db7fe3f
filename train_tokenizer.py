"""Train a BPE tokenizer on clean text.

python train_tokenizer.py --input clean.jsonl --out out/tokenizer --vocab-size 8192

Byte level is lossless on any text. Char level makes full-width letters narrow, digits and punctuation tokens of their
own, and of a character that the text lacks [UNK], or with --byte-fallback its bytes.
"""

import time
from dataclasses import dataclass
from typing import Literal

from nanophi.cli import flag, run
from nanophi.text.bpe import train_bpe
from nanophi.text.corpus import SampleBy, read_texts


@dataclass(kw_only=True)
class Config:
    input: list[str] = flag(help="clean text: files, directories or globs (.jsonl .json .txt, plain or .gz or .xz)")
    out: str = flag(help="directory for tokenizer.json and its companions")
    vocab_size: int = flag(40960, help="tokens, the 7 special ones and the bytes or characters among them")
    level: Literal["byte", "char"] = flag("byte", help="what merges start from: bytes or characters")
    split: Literal["gpt2", "qwen2"] = flag("gpt2", help="byte level: how text becomes words; qwen2 has digits alone")
    byte_fallback: bool = flag(False, help="char level: a character that the text lacks becomes its bytes, not [UNK]")
    min_frequency: int = flag(2, help="a pair that occurs less often is not merged")
    sample_by: SampleBy = flag("line", help="what is a document in a .txt file")


def main(cfg: Config) -> dict:
    started, read = time.monotonic(), {"characters": 0}

    def counted():
        for text in read_texts(cfg.input, cfg.sample_by):
            read["characters"] += len(text)
            yield text

    tok = train_bpe(counted(), cfg.vocab_size, cfg.min_frequency, cfg.level, cfg.byte_fallback, cfg.split)
    tok.save(cfg.out)
    if len(tok) < cfg.vocab_size:
        print(
            f"tokenizer: the text gave {len(tok):,} of {cfg.vocab_size:,} tokens: no other pair of tokens occurs "
            f"{cfg.min_frequency} times; models are as small as the tokenizer"
        )
    print(
        f"tokenizer: read {read['characters']:,} characters, learned {len(tok.merge_list):,} merges, "
        f"{len(tok):,} tokens, in {time.monotonic() - started:.1f} s; wrote {cfg.out}"
    )
    return {"tokens": len(tok)} | read


if __name__ == "__main__":
    run(Config, main)
