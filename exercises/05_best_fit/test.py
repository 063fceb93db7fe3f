import random

from nanophi.train.packing import best_fit


def test_each_token_but_the_first_is_a_target_exactly_once(mine):
    dice = random.Random(0)
    for context in (4, 7, 1):
        lengths = [5, 9, 1, 2, 0, *(dice.randint(0, 30) for _ in range(50))]
        times = [[0] * length for length in lengths]  # that each token is a target
        for document, start, inputs in mine.pieces(lengths, context):
            piece = f"the piece {(document, start, inputs)}"
            assert 1 <= inputs <= context, f"{piece} has {inputs} inputs, expected 1 to {context}"
            last = start + inputs
            assert last < lengths[document], (
                f"{piece} would need token {last} as a target, its document has "
                f"{lengths[document]} tokens"
            )
            for place in range(start + 1, last + 1):
                times[document][place] += 1
        for document, counts in enumerate(times):
            for place, count in enumerate(counts):
                assert count == (place > 0), (
                    f"document {document} of {lengths[document]} tokens, context {context}: token "
                    f"{place} is a target {count} times, expected {int(place > 0)}"
                )


def test_there_are_no_more_pieces_than_needed(mine):
    lengths = [5, 9, 10, 1, 0]
    found = mine.pieces(lengths, context=4)
    for document, expected in enumerate([1, 2, 3, 0, 0]):
        count = sum(piece[0] == document for piece in found)
        assert count == expected, (
            f"{lengths[document]} tokens have {max(lengths[document] - 1, 0)} targets; pieces of "
            f"at most 4: expected {expected}, yours are {count}"
        )


def test_no_row_is_too_full(mine):
    for lengths, capacity in orders():
        used = {}
        for length, row in zip(lengths, mine.best_fit(lengths, capacity), strict=True):
            used[row] = used.get(row, 0) + length
            assert used[row] <= capacity, f"row {row} of {capacity} would hold {used[row]} tokens"


def test_each_piece_goes_into_the_fullest_row_that_has_room(mine):
    for lengths, capacity in orders():
        free = []  # of each row
        for length, row in zip(lengths, mine.best_fit(lengths, capacity), strict=True):
            fitting = [space for space in free if space >= length]
            assert 0 <= row <= len(free), (
                f"row {row} came when there were {len(free)} rows; the pieces go into rows in the "
                "order given, and a new row gets the next number"
            )
            if row == len(free):
                free.append(capacity)
            expected = min(fitting, default=capacity)
            assert free[row] == expected, (
                f"the rows have {free} free; a piece of {length} belongs into a row "
                f"with {expected} free, not into row {row}"
            )
            free[row] -= length


def test_there_are_no_more_rows_than_nanophi_needs(mine):
    for lengths, capacity in orders():
        rows = len(set(mine.best_fit(lengths, capacity)))
        expected = len(set(best_fit(lengths, capacity).tolist()))
        assert rows <= expected, f"{rows} rows for {len(lengths)} pieces, nanophi needs {expected}"


def orders():
    """(lengths, capacity): a small one first, then random ones."""
    dice = random.Random(1)
    yield [4, 3, 3, 1, 2], 5
    for capacity in (5, 32, 128):
        yield [dice.randint(1, capacity) for _ in range(200)], capacity
