"""The documents of a bench: the same seeded shuffle for every contestant, and so many characters of them."""

import random

from nanophi.text.corpus import read_texts


def shuffled(inputs: list[str], seed: int) -> list[str]:
    """All documents that hold text, in an order that the seed decides."""
    documents = [text for text in read_texts(inputs) if text]
    random.Random(seed).shuffle(documents)
    return documents


def take(documents: list[str], characters: int) -> list[str]:
    """Remove documents from the end until they have `characters` together, the last one cut."""
    taken = []
    while characters > 0 and documents:
        taken.append(documents.pop()[:characters])
        characters -= len(taken[-1])
    return taken
