import json

import nanophi
from examples import small
from nanophi.tokenizer.levels import ByteLevel


def test_the_best_rank_goes_first_and_not_the_leftmost_pair(mine):
    # a, b, c = 0, 1, 2; b + c -> 3 was learned before a + b -> 4
    found = mine.merge_word([0, 1, 2], {(1, 2): (0, 3), (0, 1): (1, 4)})
    assert found == [0, 3], f"(1, 2) has rank 0, so [0, 1, 2] is [0, 3]; {found} came"


def test_among_equal_pairs_the_leftmost_goes_first(mine):
    found = mine.merge_word([7, 7, 7], {(7, 7): (0, 8)})
    assert found == [8, 7], f"[7, 7, 7] with (7, 7) -> 8 is [8, 7]; {found} came"


def test_a_merge_may_open_the_way_for_another_one(mine):
    merges = {(1, 2): (0, 5), (0, 5): (1, 6), (6, 6): (2, 9)}
    found = mine.merge_word([0, 1, 2, 0, 1, 2, 4], merges)
    assert found == [9, 4], f"ug, hug, hughug: expected [9, 4]; {found} came"


def test_a_word_may_be_empty_or_have_nothing_to_merge(mine):
    for word in ([], [3], [3, 4]):
        found = mine.merge_word(list(word), {(1, 2): (0, 5)})
        assert found == word, f"{word} has nothing to merge; {found} came"


def test_the_argument_stays_as_it_is(mine):
    given = [1, 2, 1, 2]
    found = mine.merge_word(given, {(1, 2): (0, 5)})
    assert found == [5, 5], f"expected [5, 5]; {found} came"
    assert given == [1, 2, 1, 2], f"merge_word has changed the list it was given, to {given}"


def test_the_ids_are_those_of_nanophi_and_of_hf_tokenizers(mine):
    # The spaces teach it the token of two spaces, which "a  b" does not hold: there they are two
    # words, " " and " b".
    texts = [*small.texts("documents")[:30], "if a:\n        b\n        c\n" * 20]
    tok = nanophi.train_bpe(texts, vocab_size=1000)
    questions = [small.QUESTION, *small.texts("sft")[:40], "a  b\n\n don't 🌕"]
    for text in questions:
        found = mine.encode(text, tok.level, tok.vocab, tok.merges)
        agrees(text, found, tok.encode(text), "nanophi")
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError:
        return
    theirs = Tokenizer.from_str(json.dumps(tok.to_dict()))
    for text in questions:
        agrees(text, tok.encode(text), theirs.encode(text).ids, "HF tokenizers")


def test_a_text_is_normalized_before_it_is_split(mine):
    tok = nanophi.train_bpe(["café " * 3], vocab_size=7 + 256 + 4)
    composing = ByteLevel(nfc=True)  # Qwen's: e and an accent become the one character é
    found = mine.encode("cafe\u0301", composing, tok.vocab, tok.merges)
    expected = tok.encode("caf\u00e9")
    assert found == expected, (
        f"level.normalized makes café, one é, of cafe and an accent: {expected}; {found} came"
    )


def agrees(text, found, expected, library):
    """Where they differ first."""
    if found == expected:
        return
    same = 0
    while found[same : same + 1] == expected[same : same + 1]:
        same += 1
    raise AssertionError(
        f"{text[:20]!r}: after {same} equal ids {library} goes on with "
        f"{expected[same : same + 4]}, yours with {found[same : same + 4]}"
    )
