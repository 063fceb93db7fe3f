"""Exercise 5: cut documents into pieces, and put the pieces into rows."""

from collections.abc import Sequence

Piece = tuple[int, int, int]  # (number of the document, place of its first input, inputs)


def pieces(lengths: Sequence[int], context: int) -> list[Piece]:
    """Cut documents into pieces of at most `context` inputs, in order; as few pieces as possible.

    lengths: how many tokens each document has. The piece (d, start, n) of a document `tokens` has

        inputs    tokens[start : start + n]
        targets   tokens[start + 1 : start + n + 1]

    so that over all pieces each token, but the first of a document, is a target exactly once.

        pieces([5, 9, 1], context=4)  ->  [(0, 0, 4), (1, 0, 4), (1, 4, 4)]
    """
    raise NotImplementedError("write pieces")


def best_fit(lengths: Sequence[int], capacity: int) -> list[int]:
    """The row, from 0, of each piece, of which each has 1 to `capacity` tokens.

    They are placed in the order given, each into the fullest row that still has room for it, and
    into a new row only if none has.

        best_fit([4, 3, 3, 1, 2], capacity=5)  ->  [0, 1, 2, 0, 2]      or [0, 1, 2, 0, 1]
    """
    raise NotImplementedError("write best_fit")
