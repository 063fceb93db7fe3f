from examples import small
from nanophi.text.schemas import preference_of

EXAMPLE = [
    ("p0", "aaaa", "a"),  # chosen is longer by 3
    ("p1", "aa", "a"),  # longer by 1
    ("p2", "a", "aaaaa"),  # shorter by 4
    ("p3", "aaa", "a"),  # longer by 2
    ("p4", "aa", "bb"),  # of one length
]


def demo():
    return [preference_of(row) for row in small.rows("dpo")]


def trapped():
    """Pairs of the demo, of which nearly all have the longer answer as the chosen one."""
    longer = [pair for pair in demo() if len(pair[1]) > len(pair[2])]
    shorter = [pair for pair in demo() if len(pair[1]) < len(pair[2])]
    return [shorter[0], *longer, shorter[1]]


def the_other_way_round(pairs):
    return [(prompt, rejected, chosen) for prompt, chosen, rejected in pairs]


def test_the_example_of_the_text(mine):
    found = mine.length_accuracy(EXAMPLE)
    assert found == 0.7, f"3 longer, 1 shorter, 1 equal: 3.5 of 5 are right, yours is {found}"
    found = [prompt for prompt, _, _ in mine.balanced(EXAMPLE)]
    assert found == ["p1", "p2", "p4"], f"p1, p2 and p4 stay, yours are {found}"


def test_the_trap_is_found(mine):
    found = mine.length_accuracy(trapped())
    assert found > 0.9, f"nearly all chosen answers are longer, and you say {found:.2f}"


def test_shorter_is_a_trap_too(mine):
    found = mine.length_accuracy(the_other_way_round(trapped()))
    assert found > 0.9, f"nearly all chosen answers are shorter, and you say {found:.2f}"


def test_the_pairs_of_the_demo_are_near_chance(mine):
    found = mine.length_accuracy(demo())
    assert 0.5 <= found <= 0.6, f"data/demo/dpo.jsonl should be near 0.5, you say {found:.2f}"


def test_equal_lengths_are_guessed(mine):
    equal = [("p", "ab", "cd")] * 4
    found = mine.length_accuracy(equal)
    assert found == 0.5, f"four pairs of equal lengths: 0.5, yours is {found}"
    assert mine.balanced(equal) == equal, "pairs of equal lengths teach no length: all stay"


def test_lengths_are_in_characters(mine):
    """月亮 has two characters, and six bytes in UTF-8."""
    pairs = [("p0", "moon", "月亮"), ("p1", "aa", "a"), ("p2", "aaa", "a"), ("p3", "a", "aaaaa")]
    found = mine.length_accuracy(pairs)
    assert found == 0.75, f"chosen has more characters in 3 of 4: 0.75, yours is {found}"
    found = [prompt for prompt, _, _ in mine.balanced(pairs)]
    assert found == ["p1", "p3"], f"in characters p1 and p3 stay, yours are {found}"


def test_a_balanced_set_is_balanced(mine):
    for pairs in (trapped(), the_other_way_round(trapped()), demo()):
        found = mine.length_accuracy(mine.balanced(pairs))
        assert found == 0.5, f"after balancing, the judge should be right in half, not {found:.2f}"


def test_as_many_stay_as_possible_in_their_order(mine):
    equal = ("equal", "ab", "cd")
    for pairs in ([*trapped(), equal], [equal, *the_other_way_round(trapped())], demo()):
        before = list(pairs)
        found = mine.balanced(pairs)
        assert pairs == before, "balanced has changed the list it was given"
        gaps = [len(chosen) - len(rejected) for _, chosen, rejected in pairs]
        rarer = min(sum(gap > 0 for gap in gaps), sum(gap < 0 for gap in gaps))
        count = 2 * rarer + gaps.count(0)
        assert len(found) == count, f"{count} of {len(pairs)} can stay, yours are {len(found)}"
        places = iter(pairs)
        assert all(pair in places for pair in found), "the pairs are not in their order"


def test_those_with_the_largest_difference_go(mine):
    kept = mine.balanced(trapped())
    gaps = [len(chosen) - len(rejected) for _, chosen, rejected in trapped()]
    smallest = sorted(gap for gap in gaps if gap > 0)[:2]
    found = sorted(len(c) - len(r) for _, c, r in kept if len(c) > len(r))
    assert found == smallest, f"the longer ones that stay are longer by {smallest}, not {found}"


def test_of_a_set_that_is_all_trap_nothing_is_left(mine):
    pairs = [("p", "long answer", "short"), ("q", "another long one", "no")]
    assert mine.balanced(pairs) == [], "chosen is always longer: no subset is balanced"
