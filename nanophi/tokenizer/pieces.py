"""sentencepiece as another trainer: its BPE over characters, with the settings that lose nothing (but "▁",
which is its space).

    tok = train_sentencepiece(texts, vocab_size=40960)

By default sentencepiece normalizes full-width text, eats line breaks and repeated spaces, and puts a space first; all
of that is off here. Its pieces become an ordinary tokenizer.json: every pair of pieces that spells a piece is a merge,
in the order of the pieces.
"""

import io
from collections.abc import Iterable
from pathlib import Path

from nanophi.cli import UserError
from nanophi.files import replacing, utf8
from nanophi.tokenizer.levels import PieceLevel
from nanophi.tokenizer.tokenizer import SPECIAL_TOKENS, Tokenizer


def train_sentencepiece(
    texts: Iterable[str], vocab_size: int = 40960, model_file: str | Path | None = None
) -> Tokenizer:
    """Train and convert; model_file keeps sentencepiece's own model beside. The ids are the same in both."""
    import sentencepiece

    counted = 0

    def sentences():
        nonlocal counted
        for text in texts:
            utf8(text)  # refuses half of a surrogate pair
            counted += bool(text.strip())
            yield text

    roles = {
        "pad": 0,
        "eos": 1,
        "bos": 3,
        "unk": 6,
    }  # the original's ids; control symbols fill the places between
    settings = {f"{role}_id": i for role, i in roles.items()} | {
        f"{role}_piece": f"[{role.upper()}]" for role in roles
    }
    others = [name for name in SPECIAL_TOKENS if name.strip("[]").lower() not in roles]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(), model_writer=model, model_type="bpe", vocab_size=vocab_size,
            hard_vocab_limit=False, byte_fallback=True, character_coverage=0.9999, max_sentence_length=10**9,
            normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
            control_symbols=others, minloglevel=2, **settings,
        )  # fmt: skip
    except RuntimeError as error:
        if not counted:
            raise UserError("there is no text to train a tokenizer on") from None
        raise UserError(
            f"sentencepiece cannot train with vocab_size {vocab_size}; a larger one may do"
        ) from error
    if model_file is not None:
        with replacing(model_file) as beside:
            Path(beside).write_bytes(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    assert pieces[: len(SPECIAL_TOKENS)] == SPECIAL_TOKENS, pieces[:10]
    ids = {piece: i for i, piece in enumerate(pieces) if i >= len(SPECIAL_TOKENS)}
    merges = []
    for piece in ids:
        if not processor.is_byte(ids[piece]):
            halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
            merges += sorted(
                (ids[left], ids[right]) for left, right in halves if left in ids and right in ids
            )
    return Tokenizer(PieceLevel(), list(ids), merges)
