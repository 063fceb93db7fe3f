"""The documents of a bench: one seeded shuffle for every contestant, and as many characters of them
as it needs.
"""

import random

from nanophi.text.corpus import read_texts


def shuffled(inputs: list[str], seed: int) -> list[str]:
    """All documents that hold text, in an order that the seed decides."""
    documents = [text for text in read_texts(inputs) if text]
    random.Random(seed).shuffle(documents)
    return documents


def take(documents: list[str], characters: int) -> list[str]:
    """Remove documents from the end of the list until they have `characters` together. The last one
    is cut, and its rest is lost.

    >>> documents = ["abc", "de", "fgh"]
    >>> take(documents, 4), documents
    (['fgh', 'd'], ['abc'])
    """
    taken = []
    while characters > 0 and documents:
        taken.append(documents.pop()[:characters])
        characters -= len(taken[-1])
    return taken
