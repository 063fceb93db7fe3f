from nanophi.infer import sampling


def keep_top_p(logits, p):
    return sampling.keep_top_p(logits, [], p)  # a filter of the library gets the history too


__all__ = ["keep_top_p"]
