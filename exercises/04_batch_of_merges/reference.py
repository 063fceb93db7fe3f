"""The rule of `Trainer._next_batch`, which works on the heap of a training."""


def safe_count(best):
    lefts = set()
    rights = set()
    for number, ((left, right), _) in enumerate(best):
        touches = left == right or left in rights or right in lefts
        if touches:
            return max(number, 1)
        lefts.add(left)
        rights.add(right)
    return len(best)
