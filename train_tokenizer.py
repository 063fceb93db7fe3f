"""Train a byte-level BPE tokenizer on clean text.

python train_tokenizer.py --input clean.jsonl --out out/tokenizer --vocab-size 8192
"""

import time
from dataclasses import dataclass

from nanophi.cli import flag, run
from nanophi.text.bpe import train_bpe
from nanophi.text.corpus import SampleBy, read_texts


@dataclass(kw_only=True)
class Config:
    input: list[str] = flag(help="clean text: files, directories or globs (.jsonl .json .txt, plain or .gz or .xz)")
    out: str = flag(help="directory for tokenizer.json and its companions")
    vocab_size: int = flag(40960, help="tokens, the 7 special ones and the 256 bytes among them")
    level: str = flag("byte", help="alphabet of the merges: byte")
    min_frequency: int = flag(2, help="a pair that occurs less often is not merged")
    sample_by: SampleBy = flag("line", help="what is a document in a .txt file")


def main(cfg: Config) -> dict:
    started, read = time.monotonic(), {"characters": 0}

    def counted():
        for text in read_texts(cfg.input, cfg.sample_by):
            read["characters"] += len(text)
            yield text

    tok = train_bpe(counted(), cfg.vocab_size, cfg.min_frequency, cfg.level)
    tok.save(cfg.out)
    print(
        f"tokenizer: read {read['characters']:,} characters, learned {len(tok.merge_list):,} merges, "
        f"{len(tok):,} tokens, in {time.monotonic() - started:.1f} s; wrote {cfg.out}"
    )
    return {"tokens": len(tok)} | read


if __name__ == "__main__":
    run(Config, main)
