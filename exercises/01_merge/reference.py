from functools import partial

from nanophi.tokenizer.bpe import learn_merges_naive, merge_pair

learn_merges = partial(learn_merges_naive, min_frequency=2)

__all__ = ["learn_merges", "merge_pair"]
