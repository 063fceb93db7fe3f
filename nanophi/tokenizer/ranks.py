"""tiktoken's rank files (GPT's, Qwen's .tiktoken): a token's bytes in base64 and its rank, one a line.

    tok = load_ranks("qwen.tiktoken", split="qwen2")

They hold no merges, as tiktoken merges any two neighbours whose bytes together are a token. The merges are found here
by letting each token be encoded with the tokens before it: what two parts remain is the pair that makes it.
"""

import base64
import binascii
from pathlib import Path

from nanophi.cli import UserError
from nanophi.tokenizer.levels import BYTE_TO_CHAR, level_named
from nanophi.tokenizer.tokenizer import Tokenizer


def read_ranks(path: str | Path) -> dict[bytes, int]:
    """{bytes of a token: its rank, which is its id}."""
    ranks, taken = {}, set()
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            token, rank = base64.b64decode(token, validate=True), int(rank)
        except (ValueError, binascii.Error):
            raise UserError(f"{path}, line {number}: not a token in base64 and its rank") from None
        if token in ranks or rank in taken or not 0 <= rank < 2**31:
            raise UserError(
                f"{path}, line {number}: the token or its rank {rank} stands there twice, or is no rank"
            )
        ranks[token] = rank
        taken.add(rank)
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise UserError(f"{path}: {len(missing)} of the 256 bytes are missing")
    return ranks


def parts_of(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The token encoded with the tokens of smaller rank alone."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        ranked = [(ranks.get(parts[i] + parts[i + 1], 2**31), i) for i in range(len(parts) - 1)]
        rank, i = min(ranked)
        if rank >= ranks[token]:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def load_ranks(
    path: str | Path, split: str = "gpt2", specials: dict[str, int] | None = None
) -> Tokenizer:
    """The tokenizer of a rank file. split: how its texts become words; specials: {text: id} of special tokens."""
    ranks = read_ranks(path)
    if clash := [text for text, i in (specials or {}).items() if i in ranks.values()]:
        raise UserError(f"special tokens {', '.join(clash)} have ids that {path} gives to others")
    spell = {token: "".join(BYTE_TO_CHAR[byte] for byte in token) for token in ranks}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            parts = parts_of(token, ranks)
            if len(parts) != 2:
                raise UserError(
                    f"{path}: the token of rank {rank} is not made of two tokens before it"
                )
            merges.append((ranks[parts[0]], ranks[parts[1]]))
    vocab = {spell[token]: rank for token, rank in ranks.items()}
    return Tokenizer.of_parts(
        level_named("byte", split=split), dict(specials or {}), set(specials or ()), vocab, merges
    )
