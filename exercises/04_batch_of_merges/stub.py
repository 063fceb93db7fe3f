"""Exercise 4: how many of the next merges may be done together."""

Pair = tuple[int, int]


def safe_count(best: list[tuple[Pair, int]]) -> int:
    """How many of the first pairs may be merged in one pass, so that the result never differs from
    merging one by one, counting again after each.

    best: the most frequent pairs and their counts, in the order in which training takes them: the
    largest count first, among equal counts the smaller ids. It has at least one entry, so that the
    result is 1 or more. The corpus itself you do not see: the answer must hold for any corpus with
    these counts.

        safe_count([((1, 2), 8), ((3, 4), 6)])  ->  2
        safe_count([((1, 2), 8), ((2, 3), 6)])  ->  1      "1 2 3" holds both, and they share the 2
    """
    raise NotImplementedError("write safe_count")
