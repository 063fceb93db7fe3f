"""Exercise 18: find the length trap in preference pairs, and take it out."""

Pair = tuple[str, str, str]  # prompt, chosen answer, rejected answer


def length_accuracy(pairs: list[Pair]) -> float:
    """How often a judge is right who sees nothing but the lengths of the two answers.

    He always takes the longer answer, or always the shorter one, whichever is right more often on
    these pairs. Two answers of the same length: he guesses, and is half right. Lengths are in
    characters. The result is between 0.5 and 1.
    """
    raise NotImplementedError("write length_accuracy")


def balanced(pairs: list[Pair]) -> list[Pair]:
    """As many of the pairs as possible, in their order, so that the judge is right in half of them.

    Pairs whose answers are of one length all stay. Of the kind that is more frequent (chosen is
    longer, or chosen is shorter) those stay whose lengths differ least.
    """
    raise NotImplementedError("write balanced")
