"""Token shards: what is written is read back; what does not fit is refused, and the message names
the command that helps."""

import numpy as np
import pytest

from nanophi.cli import UserError
from nanophi.text.shards import Shard, TokenSet, write_shards
from nanophi.text.share import in_share
from nanophi.tokenizer.bpe import train_bpe
from tests.conftest import TEXTS


def test_round_trip_over_several_shards(tok, tmp_path):
    texts = [f"第{i}篇文章，说的是{i * 7}。" for i in range(50)]
    writers = write_shards(texts, tok, tmp_path, val_fraction=0.2, shard_tokens=100)
    assert writers["train"].number > 1
    train = TokenSet(tmp_path, "train", tok)
    val = TokenSet(tmp_path, "val", tok)
    decoded = [
        tok.decode(document[:-1])
        for split in (train, val)
        for document in (split[i] for i in range(len(split)))
    ]
    assert sorted(decoded) == sorted(texts)
    assert all(train[i][-1] == tok.eos_id for i in range(len(train)))
    assert train.lengths.tolist() == [len(train[i]) for i in range(len(train))]
    assert 0 < len(val) < 25


def test_split_depends_on_the_text_alone():
    texts = [f"第{i}篇" for i in range(200)]
    half = {text for text in texts if in_share(text, 0.5)}
    assert 70 < len(half) < 130
    fifth = {text for text in texts if in_share(text, 0.2)}
    assert fifth < half  # a larger share keeps what a smaller one took
    assert not any(in_share(t, 0.0) for t in TEXTS)
    assert all(in_share(t, 1.0) for t in TEXTS)


def test_data_id_names_the_tokens(tok, tmp_path):
    ids = []
    for texts in (TEXTS, TEXTS, [*TEXTS[:-1], "另一篇"]):
        write_shards(texts, tok, tmp_path, 0.0)
        ids.append(TokenSet(tmp_path, "train", tok).data_id)
    assert ids[0] == ids[1] != ids[2]


def test_a_failed_run_leaves_the_old_shards_and_other_files(tok, tmp_path):
    """Once the old shards were deleted first: a typo in --input cost them, and other files too."""
    write_shards(TEXTS, tok, tmp_path, 0.0)
    (tmp_path / "pytorch_model-00001.bin").write_bytes(b"weights")
    before = TokenSet(tmp_path, "train", tok).data_id

    def failing():
        yield "一篇"
        raise UserError("line 2: not JSON")

    for texts in (failing(), []):
        with pytest.raises(UserError):
            write_shards(texts, tok, tmp_path, 0.0)
        assert TokenSet(tmp_path, "train", tok).data_id == before
    write_shards(["另一篇"], tok, tmp_path, 0.0)
    assert TokenSet(tmp_path, "train", tok).data_id != before
    assert {p.name for p in tmp_path.iterdir()} == {"train-00000.bin", "pytorch_model-00001.bin"}


def test_repr_says_what_is_there(tok, tmp_path):
    write_shards(TEXTS, tok, tmp_path, 0.0)
    train = TokenSet(tmp_path, "train")
    documents = f"{len(TEXTS)} documents"
    tokens = f"{train.lengths.sum():,} tokens"
    assert repr(train) == f"TokenSet(train, {documents}, {tokens}, {tmp_path})"
    assert repr(train.shards[0]) == f"Shard({documents}, {tokens}, {tmp_path}/train-00000.bin)"
    assert repr(TokenSet(tmp_path, "val")) == f"TokenSet(val, 0 documents, 0 tokens, {tmp_path})"


def test_another_tokenizer_is_refused(tok, tmp_path):
    write_shards(TEXTS, tok, tmp_path, 0.0)
    other = train_bpe(TEXTS, vocab_size=300)
    with pytest.raises(UserError, match="made with another tokenizer"):
        TokenSet(tmp_path, "train", other)


def test_missing_foreign_and_damaged_files(tok, tmp_path):
    with pytest.raises(UserError, match=r"no token shards in .*python -m nanophi.text.shards"):
        TokenSet(tmp_path, "train")
    write_shards(TEXTS, tok, tmp_path, 0.0)
    path = tmp_path / "train-00000.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(UserError, match="cut short or damaged"):
        Shard(path)
    path.write_bytes(np.arange(100, dtype=np.uint16).tobytes())
    with pytest.raises(UserError, match="is no token shard"):
        Shard(path)
