"""The worked batches in the docstring of `Trainer._safe_prefix`, played."""

import numpy as np
import pytest

from nanophi.tokenizer.bpe import learn_merges_naive
from nanophi.tokenizer.fast.merges import GAP, Trainer, pair_of

MEMBERS = [(1, 2), (3, 4), (5, 6)]  # they become the tokens 9, 10 and 11


def trainer_of(words: dict[tuple[int, ...], int]) -> Trainer:
    """A trainer with 9 symbols, its index built."""
    blocks = []
    for word in words:
        block = np.full(32, GAP, np.uint16)
        block[1 : 1 + len(word)] = word
        blocks.append(block)
    weights = np.array(list(words.values()), np.int64)
    trainer = Trainer(np.concatenate(blocks), weights, symbols=9, limit=20, min_frequency=1)
    trainer._index()
    return trainer


@pytest.mark.parametrize(
    ("words", "members", "safe"),
    [
        ({(1, 2): 8, (3, 4): 6, (5, 6): 4}, 3, 3),
        ({(1, 2, 3, 4): 1, (1, 2): 7, (3, 4): 5, (5, 6): 4}, 3, 1),  # "9 10": side by side
        ({(5, 6, 1, 2): 1, (1, 2): 7, (3, 4): 6, (5, 6): 3}, 3, 2),  # "11 9": side by side
        ({(1, 2, 1, 2): 4, (3, 4): 6, (5, 6): 5}, 3, 3),  # "9 9": the same member twice
        ({(7, 1, 2): 5, (1, 2): 3, (3, 4): 6, (5, 6): 4}, 2, 2),  # (7, 1) ends the batch
        ({(1, 2, 7): 5, (1, 2): 3, (3, 4): 6, (5, 6): 4}, 2, 2),  # (2, 7) ends the batch
        ({(1, 2, 1, 2): 4, (3, 4): 6, (5, 6): 2}, 2, 2),  # (2, 1) ends the batch
        ({(1, 2): 8, (3, 4): 6, (7, 5, 6): 4}, 3, 3),  # (7, 11) arises from the last member
    ],
)
def test_safe_prefix_of_a_batch(words, members, safe):
    trainer = trainer_of(words)
    batch = trainer._next_batch(3)
    assert [pair_of(key) for _, key, _ in batch] == MEMBERS[:members]
    assert trainer._merge(batch) == safe
    assert trainer.merges == MEMBERS[:safe]
    # What is put back is merged later.
    assert trainer.run() == learn_merges_naive(words, 9, 20, 1)
