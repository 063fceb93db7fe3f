"""Every token is learned exactly once per epoch, and a batch is a pure function of (seed, step)."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanophi.cli import UserError
from nanophi.train.distributed import World
from nanophi.train.mixture import Mixture
from nanophi.train.packing import IGNORE, Packed, best_fit
from nanophi.train.preferences import Pairs, Preference
from nanophi.train.preflight import show_batch
from tests.train.test_loop import random_pairs, tensors

DOCUMENTS = [
    np.arange(100 * i, 100 * i + n) for i, n in enumerate((5, 40, 2, 17, 1, 16, 33, 9), start=1)
]


def transitions(batch):
    """(input, target) of every learned position."""
    learned = batch.targets != IGNORE
    return list(zip(batch.ids[learned].tolist(), batch.targets[learned].tolist(), strict=True))


def expected_transitions(documents):
    return [(int(a), int(b)) for d in documents for a, b in itertools.pairwise(d)]


def test_all_tokens_once_per_epoch_whatever_the_documents():
    """See test_each_token...: the same for any documents, with and without [BOS]."""

    @given(
        st.lists(st.integers(0, 30), min_size=1, max_size=20),
        st.integers(1, 12),
        st.integers(1, 5),
        st.booleans(),
    )
    def check(lengths, context, batch_rows, bos):
        documents = [np.arange(100 * i, 100 * i + n) for i, n in enumerate(lengths, start=1)]
        with_bos = [np.concatenate([[3], d]) for d in documents] if bos else documents
        wanted = Counter(expected_transitions(with_bos))
        if wanted:
            data = Packed(documents, context, batch_rows, seed=0, bos_id=3 if bos else None)
            assert Counter(t for batch in data.in_order() for t in transitions(batch)) == wanted
            assert data.tokens == sum(lengths)
            assert data.cut_documents == np.mean(
                [len(d) - 1 > context for d in with_bos if len(d) > 1]
            )

    check()


def test_ranks_joined_are_the_step():
    """The batch of a step does not know how many ranks there are: they cut it, and nothing is lost
    or doubled.
    """
    data = Packed(DOCUMENTS, 16, batch_rows=4, seed=0)
    whole = data.batch_at(5)
    for world in (1, 2, 4):
        parts = [
            data.batch_at(5).cut(4 * rank // world, 4 * (rank + 1) // world)
            for rank in range(world)
        ]
        assert torch.equal(torch.cat([part.ids for part in parts]), whole.ids)
        assert torch.equal(torch.cat([part.targets for part in parts]), whole.targets)


@pytest.mark.parametrize("context", [4, 16, 64])
def test_each_token_after_a_documents_first_is_a_target_once_per_epoch(context):
    """A long document's next piece begins with the last token of the one before, or one target a
    cut would be lost.
    """
    data = Packed(DOCUMENTS, context, batch_rows=1, seed=0)
    seen = Counter(t for step in range(len(data)) for t in transitions(data.batch_at(step)))
    assert seen == Counter(expected_transitions(DOCUMENTS))
    seen = Counter(t for batch in data.in_order() for t in transitions(batch))
    assert seen == Counter(expected_transitions(DOCUMENTS))


def test_boundaries_isolate_documents():
    data = Packed(DOCUMENTS, 16, batch_rows=3, seed=0)
    for step in range(4):
        batch = data.batch_at(step)
        cu = batch.cu_seqlens.tolist()
        assert cu[0] == 0
        assert cu[-1] == batch.ids.numel()
        assert set(range(0, cu[-1] + 1, 16)) <= set(cu)
        assert cu == sorted(set(cu))
        for a, b in itertools.pairwise(cu):
            ids, targets = batch.ids.flatten()[a:b], batch.targets.flatten()[a:b]
            if (targets == IGNORE).all():
                assert (ids == 0).all()  # padding, a document of its own
            else:
                assert torch.equal(targets, ids + 1)  # consecutive numbers of one document
                assert len(set((ids // 100).tolist())) == 1
        assert batch.real_tokens == (batch.ids != 0).sum()


def test_batches_depend_on_seed_and_step_alone():
    first, second = (Packed(DOCUMENTS, 16, batch_rows=2, seed=3) for _ in range(2))
    later = [second.batch_at(step) for step in (7, 2, 5)]
    for step, batch in zip((7, 2, 5), later, strict=True):
        assert torch.equal(first.batch_at(step).ids, batch.ids)
    epoch = len(first) // 2
    assert not torch.equal(
        first.batch_at(0).ids, first.batch_at(epoch).ids
    )  # another order each epoch
    assert not torch.equal(first.batch_at(0).ids, Packed(DOCUMENTS, 16, 2, seed=4).batch_at(0).ids)


def test_masks_hide_prompts_and_bos_is_put_first():
    documents, masks = [np.array([11, 12, 13, 14])], [np.array([False, False, True, True])]
    batch = Packed(documents, 8, 1, 0, masks, bos_id=3).batch_at(0)
    assert batch.ids[0].tolist() == [3, 11, 12, 13, 0, 0, 0, 0]
    assert batch.targets[0].tolist() == [IGNORE, IGNORE, 13, 14] + [IGNORE] * 4


def test_padding_is_known_by_its_place_and_not_by_its_id(tok):
    """A vocabulary from elsewhere may use the id 0 for text. It was counted as padding, and
    a document that began with it was not shown.
    """
    batch = Packed([np.array([0, 0, 7, 0])], 8, 1, seed=0).batch_at(0)
    assert batch.ids[0].tolist() == [0, 0, 7, 0, 0, 0, 0, 0]
    assert batch.real_tokens == 3
    assert batch.cut(0, 1).real_tokens == 3
    assert show_batch(batch, tok).startswith("┃⟦[PAD][PAD]")


def test_cutting_a_batch_loses_nothing():
    batch = Packed(DOCUMENTS, 16, batch_rows=5, seed=0).batch_at(0)
    parts = [batch.cut(start, start + 2) for start in (0, 2, 4)]
    assert [len(part) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part.ids for part in parts]), batch.ids)
    lengths = torch.cat([part.cu_seqlens.diff() for part in parts])
    assert torch.equal(lengths, batch.cu_seqlens.diff())
    learned = [part.targets.flatten()[part.learned] for part in parts]
    assert torch.equal(torch.cat(learned), batch.targets[batch.targets != IGNORE])


@given(st.lists(st.integers(1, 16), min_size=1, max_size=60))
def test_best_fit_places_each_piece_once_in_the_fullest_row_with_room(lengths):
    rows: list[list[int]] = [[] for _ in lengths]
    for i, row in enumerate(best_fit(lengths, 16)):
        rows[row].append(i)
    rows = [row for row in rows if row]
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 16 for row in rows)
    slow: list[list[int]] = []
    for i, length in enumerate(lengths):
        room = [row for row in slow if sum(lengths[j] for j in row) + length <= 16]
        fullest = max(room, key=lambda row: sum(lengths[j] for j in row), default=None)
        if fullest is None:
            slow.append([i])
        else:
            fullest.append(i)
    assert sorted(sum(lengths[i] for i in row) for row in rows) == sorted(
        sum(lengths[i] for i in row) for row in slow
    )


def test_pairs_share_a_batch_row_by_row():
    a = ([11, 12, 13, 1], [False, False, True, True])
    b = ([11, 12, 14, 15, 16, 1], [False, False, True, True, True, True])
    data = Pairs([Preference(a, b), Preference(b, a)], batch_pairs=2, seed=0)
    data.reference = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]])
    batch = data.batch([0, 1])
    assert len(batch) == 2
    assert batch.ids.tolist()[:2] == [[11, 12, 13, 0, 0], [11, 12, 14, 15, 16]]
    assert batch.targets.tolist()[:2] == [[IGNORE, 13, 1, IGNORE, IGNORE], [IGNORE, 14, 15, 16, 1]]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 10, 15, 18, 20]
    assert batch.reference.tolist() == [-1, -2, -3, -4]
    second = batch.cut(1, 2)
    assert second.ids.tolist() == batch.ids.tolist()[2:]
    assert second.reference.tolist() == [-3, -4]
    order = [data.batch_at(0).ids[0, 2].item(), data.batch_at(0).ids[2, 2].item()]
    assert sorted(order) == [13, 14]  # an epoch holds each pair once
    longer = Pairs(data.pairs, 2, seed=0, multiple=4).batch([0, 1])
    assert longer.ids.shape == (4, 8)
    assert longer.cu_seqlens.tolist() == [0, 3, 8, 13, 16, 21, 24, 27, 32]
    assert torch.equal(longer.targets[:, :5], batch.targets)


def sources() -> dict[str, Packed | Mixture | Pairs]:
    """All that gives batches, with documents and pairs of many lengths."""
    rows = Packed(DOCUMENTS, 16, batch_rows=7, seed=0)
    others = Packed([document + 1000 for document in DOCUMENTS], 16, batch_rows=7, seed=1)
    found = {"rows": rows, "mixture": Mixture({"a": rows, "b": others}, [0.7, 0.3], 7)}
    for name, share in (("pairs", False), ("pairs that share prompts", True)):
        found[name] = Pairs(random_pairs(11), 7, seed=2, share=share)
        found[name].reference = torch.randn(11, 2)
    return found


@pytest.mark.parametrize("name", sources())
def test_a_part_that_is_built_alone_is_that_of_the_whole(name):
    """A rank builds its own samples and no others."""
    data = sources()[name]
    for step in (0, 1, 5):
        whole = data.batch_at(step)
        for size in (1, 2, 3, 7):
            for rank in range(size):
                part = World(rank, size, "cpu").part(len(whole))
                built = contents(data.batch_at(step, part=part))
                cut = contents(whole.cut(*part))
                assert built.keys() == cut.keys()
                assert len(built) >= 6
                assert all(torch.equal(built[field], cut[field]) for field in cut)


def contents(batch) -> dict[str, torch.Tensor]:
    """The tensors and numbers of a batch, and of its branches."""
    found = tensors(vars(batch)) | tensors(vars(batch.branches or batch), "branches")
    numbers = ("rows_per_sample", "answers_per_row", "longest")
    return found | {field: torch.tensor(getattr(batch, field)) for field in numbers}


def test_nothing_to_learn_is_said():
    with pytest.raises(UserError, match="nothing to learn"):
        Packed([np.array([5])], 8, 1, 0)
    with pytest.raises(UserError, match="no preference pair"):
        Pairs([], 2, 0)
    side = ([7, 8, 9], [False, True, True])
    with pytest.raises(UserError, match="multiple is 0"):
        Pairs([Preference(side, side)], 2, 0, multiple=0)


def test_documents_that_can_be_read_only_once_are_refused():
    """Of a generator the lengths were read, nothing was left, and it was said to be empty."""
    with pytest.raises(UserError, match="documents are of type generator, expected a list"):
        Packed((document for document in DOCUMENTS), 8, 1, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"bos_id": "x"}, "bos_id is"),
        ({"bos_id": -1}, "bos_id is -1"),
    ],
)
def test_wrong_numbers_are_one_line(changes, message):
    with pytest.raises(UserError, match=message):
        Packed(DOCUMENTS, **{"context": 8, "batch_rows": 1, "seed": 0} | changes)


def test_data_id_changes_with_data_and_layout():
    base = Packed(DOCUMENTS, 16, 2, 0).data_id
    assert base == Packed(DOCUMENTS, 16, 2, 0).data_id
    others = [Packed(DOCUMENTS, 8, 2, 0), Packed(DOCUMENTS, 16, 4, 0), Packed(DOCUMENTS, 16, 2, 1)]
    others += [
        Packed([*DOCUMENTS[:-1], DOCUMENTS[-1] + 1], 16, 2, 0),
        Packed(DOCUMENTS, 16, 2, 0, bos_id=3),
    ]
    assert len({base, *(other.data_id for other in others)}) == 6
