# The library has no function for this: whoever writes pairs must look at them.


def gap(pair):
    _, chosen, rejected = pair
    return len(chosen) - len(rejected)


def length_accuracy(pairs):
    longer = sum(gap(pair) > 0 for pair in pairs) + sum(gap(pair) == 0 for pair in pairs) / 2
    return max(longer, len(pairs) - longer) / len(pairs)


def balanced(pairs):
    longer = [number for number, pair in enumerate(pairs) if gap(pair) > 0]
    shorter = [number for number, pair in enumerate(pairs) if gap(pair) < 0]
    count = min(len(longer), len(shorter))
    gone = set()
    for kind in (longer, shorter):
        gone |= set(sorted(kind, key=lambda number: abs(gap(pairs[number])))[count:])
    return [pair for number, pair in enumerate(pairs) if number not in gone]


__all__ = ["balanced", "length_accuracy"]
