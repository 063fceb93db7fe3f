"""Encoding many texts at once: tokenizer.encode's ids, an order of magnitude faster.

Nearly every word (clause) of Chinese is new, but its parts are not. A word can be cut between two characters wherever
no token of the vocabulary reaches across: no merge can cross such a place, so the parts have the ids they have alone.
Parts are short and repeat, so each is encoded once and then looked up, all in numpy.

    感冒了要多喝水   --no token holds 了要 or 要多-->   感冒了 | 要 | 多喝水   --look up-->   ids
"""

from functools import cache
from itertools import pairwise

import numpy as np

from nanophi.tokenizer.fast.table import Table, spread
from nanophi.tokenizer.fast.words import WordStore, codes_of
from nanophi.tokenizer.splits import BREAK

MOST_PARTS = 2_000_000  # remembered; some 200 MB. Beyond it the memory starts afresh
LONGEST_IN_ROUNDS = 64  # characters; each round merges one pair of every part
SIEVE_BITS = (
    21  # of the hashed sets of character pairs and triples; a false hit only makes a part longer
)


def _places(*characters: np.ndarray) -> np.ndarray:
    """Where pairs or triples of characters, each (N,) uint32, lie in a sieve."""
    mixed = np.zeros(1, np.uint32)
    for codes, odd in zip(characters, (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D), strict=False):
        mixed = mixed ^ codes * np.uint32(odd)
    return mixed >> np.uint32(32 - SIEVE_BITS)


@cache
def outer_bytes() -> tuple[np.ndarray, np.ndarray]:
    """The first and the last byte of each code point's UTF-8: (0x110000,) uint8 each."""
    c = np.arange(0x110000)
    first = np.where(
        c < 0x80,
        c,
        np.where(c < 0x800, 0xC0 | c >> 6, np.where(c < 0x10000, 0xE0 | c >> 12, 0xF0 | c >> 18)),
    )
    return first.astype(np.uint8), np.where(c < 0x80, c, 0x80 | c & 0x3F).astype(np.uint8)


class BatchEncoder:
    """For one tokenizer, whose vocabulary must not change while it is used."""

    def __init__(self, tok):
        self.tok = tok
        self.pairs, self.triples = np.zeros(1 << SIEVE_BITS, bool), np.zeros(1 << SIEVE_BITS, bool)
        self.torn = np.zeros(
            (256, 256), bool
        )  # bytes on both sides of a border inside a token that tears a character
        pairs, triples = [], []
        for token in tok.id_to_bytes.values():
            try:
                text = token.decode()
            except UnicodeDecodeError:
                for before, after in pairwise(token):
                    self.torn[before, after] |= after & 0xC0 != 0x80
                continue
            text = text if tok.level.name == "byte" else text.replace(" ", "▁")
            if len(text) == 2:
                pairs.append(tuple(map(ord, text)))
            triples += [tuple(map(ord, text[i : i + 3])) for i in range(len(text) - 2)]
        for sieve, grams in ((self.pairs, pairs), (self.triples, triples)):
            if grams:
                sieve[_places(*np.array(grams, np.uint32).T)] = True
        # The id of a character that is one token, -1 of one that is not, -2 of one not seen yet.
        self.alone = np.full(0x110000, -2, np.int32)
        if tok.level.name == "byte":
            self.byte_ids = tok.level.lookup(tok.vocab, 0, np.int32)
        self.ranks = Table(np.uint64)
        keys = np.array([left << 32 | right for left, right in tok.merges], np.uint64)
        ranks = np.array([rank for rank, _ in tok.merges.values()], np.int32)
        self.ranks.add(keys, ranks)
        self.merged = np.zeros(len(tok.merge_list), np.int32)
        self.merged[ranks] = [merged for _, merged in tok.merges.values()]
        self._forget()

    def _forget(self) -> None:
        self.store = WordStore()
        self.ids = np.zeros(
            1 << 16, np.int32
        )  # of all parts, one behind the other, with room to grow
        self.used = 0
        self.offsets, self.sizes = np.zeros(0, np.int64), np.zeros(0, np.int64)

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text, in which no added token is looked for."""
        codes = codes_of([self.tok.level.normalized(text) for text in texts])
        begins = np.flatnonzero(self._borders(codes, self.tok.level.starts(codes)))
        ends = np.append(begins[1:], len(codes))
        real = codes.take(begins) != BREAK
        if len(self.store) > MOST_PARTS:
            self._forget()
        rows = self.store.rows_of(codes, begins[real], ends[real])
        self._learn()
        sizes = self.sizes.take(rows)
        ids = self.ids.take(spread(self.offsets.take(rows), sizes))
        until = np.zeros(len(begins), np.int64)
        until[real] = sizes
        return np.split(ids, np.cumsum(until)[~real][:-1]) if texts else []

    def _borders(self, codes: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """Where a word starts, or no token can reach across the border before a character."""
        crossed, narrow = np.zeros(len(codes), bool), codes.astype(np.uint32)
        crossed[1:] = self.pairs.take(_places(narrow[:-1], narrow[1:]))
        triples = self.triples.take(_places(narrow[:-2], narrow[1:-1], narrow[2:]))
        crossed[1:-1] |= triples
        crossed[2:] |= triples
        crossed &= ~starts
        open_ = np.flatnonzero(~(crossed | starts)[1:]) + 1
        crossed[open_[self._torn(codes.take(open_ - 1), codes.take(open_))]] = True
        return ~crossed

    def _torn(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """Whether some token that tears a character may lie across the border between two characters."""
        first, last = outer_bytes()
        return self.torn[last.take(before), first.take(after)]

    def _learn(self) -> None:
        """Encode the parts that have come into the store."""
        known = len(self.sizes)
        if known == len(self.store):
            return
        codes = self.store.codes[self.store.begins[known] : self.store.used].astype(np.int64)
        lengths = self.store.lengths[known:]
        for code in np.unique(codes[self.alone.take(codes) == -2]).tolist():
            ids = self.tok.encode_word(chr(code))
            self.alone[code] = ids[0] if len(ids) == 1 else -1
        # Where every character is a token and none can be torn, merging may begin with characters: within a character
        # merges come out the same whatever stands beside it. Other parts begin with bytes; long ones, which would take
        # many rounds, and characters that are [UNK], are encoded one by one.
        begins = np.cumsum(lengths) - lengths
        tokens = self.alone.take(codes)
        odd = tokens < 0
        odd[1:] |= self._torn(codes[:-1], codes[1:])
        odd[begins] = tokens[begins] < 0
        odd = np.logical_or.reduceat(odd, begins)
        slow = (lengths > LONGEST_IN_ROUNDS) | (odd if self.tok.level.name == "char" else False)
        easy = np.flatnonzero(~odd & ~slow)
        done = self._merge(easy, lengths[easy], tokens.take(spread(begins[easy], lengths[easy])))
        if len(hard := np.flatnonzero(odd & ~slow)):
            some = codes.take(spread(begins[hard], lengths[hard])).astype(np.uint32)
            bytes_each = 1 + (some >= 0x80) + (some >= 0x800) + (some >= 0x10000)
            sizes = np.add.reduceat(bytes_each, np.cumsum(lengths[hard]) - lengths[hard])
            done += self._merge(hard, sizes, self.byte_ids.take(self.tok.level.symbol_codes(some)))
        for part in np.flatnonzero(slow).tolist():
            text = "".join(map(chr, codes[begins[part] : begins[part] + lengths[part]].tolist()))
            ids = np.array(self.tok.encode_word(text), np.int32)
            done.append((np.array([part]), np.array([len(ids)]), ids))
        order, sizes, found = (np.concatenate(column) for column in zip(*done, strict=True))
        if self.used + len(found) > len(self.ids):
            self.ids = np.append(
                self.ids[: self.used], np.zeros(self.used + 2 * len(found), np.int32)
            )
        self.ids[self.used : self.used + len(found)] = found
        back = np.argsort(order)
        self.offsets = np.append(self.offsets, self.used + (np.cumsum(sizes) - sizes)[back])
        self.sizes = np.append(self.sizes, sizes[back])
        self.used += len(found)

    def _merge(self, parts: np.ndarray, sizes: np.ndarray, tokens: np.ndarray) -> list[tuple]:
        """Merge all parts side by side, in each the best-ranked pair, until nothing is left to merge.

        sizes: tokens of each part, in a row in `tokens`. Returns (parts, their sizes, their tokens) by the round in
        which they were finished.
        """
        never = np.int32(2**31 - 1)
        finished = []
        while len(parts):
            begins = np.cumsum(sizes) - sizes
            ranks = self.ranks.find(
                tokens[:-1].astype(np.uint64) << np.uint64(32) | tokens[1:].astype(np.uint64)
            )
            ranks = np.append(np.where(ranks < 0, never, ranks), never)
            ranks[begins[1:] - 1] = never  # a part's last token has no right neighbour in it
            best = np.minimum.reduceat(ranks, begins)
            over = best == never
            owned = np.repeat(over, sizes)
            finished.append((parts[over], sizes[over], tokens[owned]))
            parts, sizes, best = parts[~over], sizes[~over], best[~over]
            tokens, ranks = tokens[~owned], ranks[~owned]
            owner = np.repeat(np.arange(len(parts)), sizes)
            at = np.flatnonzero(ranks == best.take(owner))
            at = at[
                np.append(True, np.diff(owner.take(at)) != 0)[: len(at)]
            ]  # the leftmost of each part
            tokens[at] = self.merged.take(ranks.take(at))
            keep = np.ones(len(tokens), bool)
            keep[at + 1] = False
            tokens, sizes = tokens[keep], sizes - 1
        return finished
