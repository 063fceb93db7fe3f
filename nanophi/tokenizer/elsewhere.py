"""Tokenizers that other trainers made.

    tok = load_ranks("qwen.tiktoken", split="qwen2")      1. a rank file of tiktoken
    tok = train_sentencepiece(texts, vocab_size=40960)    2. sentencepiece's BPE over characters

Both become an ordinary Tokenizer, which `save` writes as a tokenizer.json. Neither kind holds
merges, so the merges are found from the tokens.
"""

import base64
import binascii
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nanophi.cli import SHOWN, UserError
from nanophi.expect import Expected, check
from nanophi.files import replacing, utf8
from nanophi.tokenizer.levels import BYTE_TO_CHAR, PieceLevel, level_named
from nanophi.tokenizer.tokenizer import (
    LARGEST_ID,
    SPECIAL_TOKENS,
    Tokenizer,
    checked_size,
    each_text,
    refuse_one_string,
)

# ---- 1. tiktoken's rank files: GPT's, and Qwen's .tiktoken

# Each line has a token's bytes in base64 and its rank, which is its id: "5oSf 57" is 感. tiktoken
# merges any two neighbours whose bytes together are a token, the smallest rank first.


def load_ranks(
    path: str | Path, split: str = "gpt2", specials: dict[str, int] | None = None
) -> Tokenizer:
    """The tokenizer of a rank file.

    split: how its texts become words, a name in splits.SPLITS; the file does not say. specials:
    {text: id} of its special tokens, which the file does not hold either. Raises a UserError that
    names the line at fault.
    """
    specials = specials or {}
    check(specials, Expected(dict), "specials")
    for text, i in specials.items():
        check(text, Expected(str), "a text of specials")
        check(i, Expected(int, at_least=0, at_most=LARGEST_ID), f"the id of {text} in specials")
    if len(set(specials.values())) < len(specials):
        raise UserError("two special tokens have one id")
    specials = dict(specials)
    ranks = read_ranks(path)
    taken = set(ranks.values())
    if clash := [text for text, i in specials.items() if i in taken]:
        raise UserError(f"special tokens {', '.join(clash)} have ids that {path} gives to others")
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = parts_of(token, ranks)
        if len(parts) != 2:
            raise UserError(f"{path}: the token of rank {rank} is not made of two tokens before it")
        left, right = parts
        merges.append((ranks[left], ranks[right]))
    vocab = {"".join(BYTE_TO_CHAR[byte] for byte in token): rank for token, rank in ranks.items()}
    level = level_named("byte", split=split)
    return Tokenizer.of_parts(level, specials, set(specials), vocab, merges)


def read_ranks(path: str | Path) -> dict[bytes, int]:
    """{bytes of a token: its rank}. All 256 bytes must be among the tokens."""
    ranks: dict[bytes, int] = {}
    taken: set[int] = set()
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            encoded, digits = line.split()
            token = base64.b64decode(encoded, validate=True)
            rank = int(digits)
        except (ValueError, binascii.Error):
            raise UserError(f"{path}, line {number}: not a token in base64 and its rank") from None
        if token in ranks or rank in taken or not 0 <= rank <= LARGEST_ID:
            shown_rank = digits[:SHOWN].decode()
            raise UserError(
                f"{path}, line {number}: the token or its rank {shown_rank} stands there twice, "
                f"or is no rank from 0 to {LARGEST_ID:,}"
            )
        ranks[token] = rank
        taken.add(rank)
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise UserError(f"{path}: {len(missing)} of the 256 bytes are missing")
    return ranks


def parts_of(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """A token as tiktoken would encode it if it had only the tokens of smaller rank.

    If two parts remain, they are the pair whose merge makes the token:

    >>> parts_of(b"hugs", {b"h": 0, b"u": 1, b"g": 2, b"s": 3, b"ug": 4, b"hug": 5, b"hugs": 6})
    [b'hug', b's']
    """
    never = LARGEST_ID + 1
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        joined = [parts[i] + parts[i + 1] for i in range(len(parts) - 1)]
        rank, i = min((ranks.get(part, never), i) for i, part in enumerate(joined))
        if rank >= ranks[token]:
            break
        parts[i : i + 2] = [joined[i]]
    return parts


# ---- 2. sentencepiece

# By default sentencepiece normalizes full-width text, eats line breaks and repeated spaces, and
# puts a space first. All of that is off here, so that nothing is lost, except that "▁", which is
# its space, comes back as a space.

# The original's ids. Control symbols fill the ids between.
SENTENCEPIECE_ROLES = {"pad": 0, "eos": 1, "bos": 3, "unk": 6}


def train_sentencepiece(
    texts: Iterable[str], vocab_size: int = 40960, model_file: str | Path | None = None
) -> Tokenizer:
    """Train with sentencepiece and convert the result; the ids are the same in both.

    model_file: also write sentencepiece's own model there. Raises a UserError if there is no text,
    or if vocab_size is too small for its characters.
    """
    refuse_one_string(texts, "train_sentencepiece")
    vocab_size = checked_size(vocab_size, "vocab_size")
    if vocab_size > LARGEST_ID:
        raise UserError(f"vocab_size {vocab_size:,} is too large: at most {LARGEST_ID:,}")
    model = sentencepiece_model(texts, vocab_size)
    if model_file is not None:
        with replacing(model_file) as beside:
            Path(beside).write_bytes(model)
    return of_sentencepiece(model)


def sentencepiece_model(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train a sentencepiece model; returns the bytes of its file."""
    import sentencepiece

    texts_with_content = 0
    faults: list[Exception] = []  # sentencepiece forgets what its iterator raises

    def sentences() -> Iterator[str]:
        nonlocal texts_with_content
        try:
            for text in each_text(texts, "train_sentencepiece"):
                utf8(text)  # refuses half of a surrogate pair
                if text.strip():
                    texts_with_content += 1
                yield text
        except Exception as error:
            faults.append(error)
            raise

    ids: dict[str, Any] = {f"{role}_id": i for role, i in SENTENCEPIECE_ROLES.items()}
    names: dict[str, Any] = {f"{role}_piece": f"[{role.upper()}]" for role in SENTENCEPIECE_ROLES}
    others = [name for name in SPECIAL_TOKENS if name not in names.values()]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            character_coverage=0.9999,
            max_sentence_length=10**9,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            control_symbols=others,
            minloglevel=2,
            **ids,
            **names,
        )
    except RuntimeError as error:
        if faults:
            raise faults[0] from None
        if texts_with_content == 0:
            raise UserError("there is no text to train a tokenizer on") from None
        raise UserError(
            f"sentencepiece cannot train with vocab_size {vocab_size}; a larger one may do"
        ) from error
    return model.getvalue()


def of_sentencepiece(model: bytes) -> Tokenizer:
    """The tokenizer of a model that `sentencepiece_model` trained.

    Every pair of pieces that spells a piece is a merge, in the order of the pieces: if 感冒 and 了
    and 感 and 冒了 are pieces, then 感冒了 has the merges (感, 冒了) and (感冒, 了).
    """
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    first = len(SPECIAL_TOKENS)
    assert pieces[:first] == SPECIAL_TOKENS, pieces[:10]
    ids = {piece: i for i, piece in enumerate(pieces) if i >= first}
    merges = []
    for piece, i in ids.items():
        if not processor.is_byte(i):
            halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
            merges += sorted(
                (ids[left], ids[right]) for left, right in halves if left in ids and right in ids
            )
    return Tokenizer(PieceLevel(), list(ids), merges)
