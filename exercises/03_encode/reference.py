from nanophi.tokenizer.tokenizer import merge_word


def encode(text, level, vocab, merges):
    ids = []
    for word in level.words(level.normalized(text)):
        ids += merge_word([vocab[symbol] for symbol in level.symbols(word)], merges)
    return ids


__all__ = ["encode", "merge_word"]
