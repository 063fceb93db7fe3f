"""Exercise 6: a conversation as ids, and which of them are learned."""

from nanophi import Tokenizer
from nanophi.tokenizer.template import Segment

IGNORE = -100  # the target of a place where nothing is learned


def encode_segments(segments: list[Segment], tok: Tokenizer) -> tuple[list[int], list[bool]]:
    """(ids, mask) of a conversation, equally long; mask is True where a token is learned.

    A segment has three fields:

        text      what is encoded
        learned   whether the model learns it: the answers and their end
        special   whether the text is the name of one special token: tok.special_id("[EOS]")

        Segment("##提问:\\n你是谁？\\n##回答:\\n")           ids 5 6 7 8     mask F F F F
        Segment("小助手。", learned=True)                 ids 9 10        mask T T
        Segment("[EOS]", learned=True, special=True)      ids 1           mask T
    """
    raise NotImplementedError("write encode_segments")


def inputs_and_targets(ids: list[int], mask: list[bool]) -> tuple[list[int], list[int]]:
    """What the model reads and what it shall say next, both one shorter than `ids`.

    The target of a place is the token after it, and IGNORE if that token is not learned.

        ids 5 6 9 1, mask F F T T   ->   inputs 5 6 9, targets -100 9 1
    """
    raise NotImplementedError("write inputs_and_targets")
