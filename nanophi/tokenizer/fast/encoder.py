"""Many texts -> ids, with numpy.

This file gives the same ids as its plain twins, `encode_word_naive` in bpe.py and `encode` in
tokenizer.py, an order of magnitude faster. Skip it at first reading. table.py says in which order
to read this folder; read this file from top to bottom.

Nearly every word (clause) of Chinese is new, but its parts are not. A word can be cut at a border
between two characters if no token of the vocabulary reaches across the border. No merge can cross
such a border, so each part has the ids that it has alone. Parts are short and come many times, so
each different part is encoded only once, and then looked up:

    感冒了要多喝水        no token holds 了要 or 要多, so cut there
    感冒了 | 要 | 多喝水  look up the row of each part; encode the new parts
    [812] [96] [377 905]  join the ids of the parts
"""

from functools import cache
from itertools import pairwise

import numpy as np

from nanophi.tokenizer.fast.table import Table, begins_of, spread
from nanophi.tokenizer.fast.words import WordStore, codes_of
from nanophi.tokenizer.splits import BREAK

MOST_PARTS = 2_000_000  # remembered parts, some 200 MB; beyond that the memory starts afresh
LONGEST_IN_ROUNDS = 64  # characters of a part; each round merges one pair of every part
SIEVE_BITS = 21  # a sieve has 2^21 cells; a false hit only makes a part longer

NOT_ONE_TOKEN = -1  # for the id of a character that is not a single token
NOT_SEEN = -2  # for the id of a character that has not been looked up yet
NO_PAIR = np.int32(2**31 - 1)  # a rank after all others: these two tokens are never merged

# Parts that have been encoded: their numbers, how many ids each has, and all their ids in a row.
Encoded = tuple[np.ndarray, np.ndarray, np.ndarray]

# ---- Characters and their bytes


def sieve_cells(*characters: np.ndarray) -> np.ndarray:
    """The cell of each pair or triple of characters in a sieve: (N,) uint32.

    A sieve is a set that keeps no keys, but a mark in the cell to which a key is hashed. Few keys
    meet the mark of another key, since most cells are empty.

    characters: two or three arrays (N,) uint32: the first, the second (and the third) characters.

    >>> sieve = np.zeros(1 << SIEVE_BITS, bool)
    >>> before = np.array([ord("感"), ord("冒")], np.uint32)
    >>> after = np.array([ord("冒"), ord("感")], np.uint32)
    >>> sieve[sieve_cells(before[:1], after[:1])] = True  # note the pair 感冒
    >>> sieve[sieve_cells(before, after)].tolist()  # 感冒 is in the sieve, 冒感 is not
    [True, False]
    """
    mixed = np.zeros(1, np.uint32)
    factors = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)  # odd numbers with bits at random
    for codes, factor in zip(characters, factors, strict=False):
        mixed = mixed ^ (codes * np.uint32(factor))
    return mixed >> np.uint32(32 - SIEVE_BITS)


@cache
def outer_bytes() -> tuple[np.ndarray, np.ndarray]:
    """The first and the last byte of each code point's UTF-8: (0x110000,) uint8 each.

    >>> first, last = outer_bytes()
    >>> "感".encode(), hex(first[ord("感")]), hex(last[ord("感")])
    (b'\\xe6\\x84\\x9f', '0xe6', '0x9f')
    """
    codes = np.arange(0x110000)
    first = 0xF0 | (codes >> 18)
    first = np.where(codes < 0x10000, 0xE0 | (codes >> 12), first)
    first = np.where(codes < 0x800, 0xC0 | (codes >> 6), first)
    first = np.where(codes < 0x80, codes, first)
    last = np.where(codes < 0x80, codes, 0x80 | (codes & 0x3F))
    return first.astype(np.uint8), last.astype(np.uint8)


def byte_counts(codes: np.ndarray) -> np.ndarray:
    """How many bytes of UTF-8 each code point has.

    >>> byte_counts(np.array([ord(char) for char in "aé感😀"])).tolist()
    [1, 2, 3, 4]
    """
    return 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)


def values_of(parts, values, begins, lengths) -> np.ndarray:
    """The values of some parts in a row, where `values` has one for each character of all parts.

    begins, lengths: where each of all parts stands in `values`.

    >>> values = np.array([10, 11, 20, 30, 31])
    >>> values_of(np.array([0, 2]), values, np.array([0, 2, 3]), np.array([2, 1, 2])).tolist()
    [10, 11, 30, 31]
    """
    return values.take(spread(begins[parts], lengths[parts]))


# ---- The encoder


class BatchEncoder:
    """Encodes texts with one tokenizer, whose vocabulary must not change in the meantime.

    It uses five attributes of the tokenizer:

        level          how texts become words, and words symbols (levels.py)
        id_to_bytes    {id: the bytes of the token}, to find which borders tokens cross
        vocab          {spelling: id}, for the ids of the 256 bytes
        merges         {(left id, right id): (rank, merged id)}
        encode_word    a word -> its ids, for what is encoded one by one
    """

    def __init__(self, tok):
        self.level = tok.level
        self.encode_word = tok.encode_word
        self.is_byte_level = tok.level.name == "byte"

        self.pairs = np.zeros(1 << SIEVE_BITS, bool)  # sieve of the tokens of two characters
        self.triples = np.zeros(1 << SIEVE_BITS, bool)  # sieve of all three characters in a token
        self.torn = np.zeros((256, 256), bool)  # [last byte of one character, first of the next]
        self._note_tokens(tok.id_to_bytes.values())

        # The id of each character that is one token, otherwise NOT_ONE_TOKEN or NOT_SEEN.
        self.character_ids = np.full(0x110000, NOT_SEEN, np.int32)
        if self.is_byte_level:
            self.byte_ids = tok.level.lookup(tok.vocab, 0, np.int32)

        # The merges: (left << 32) | right -> rank, and rank -> merged id.
        keys = np.array([(left << 32) | right for left, right in tok.merges], np.uint64)
        ranks = np.array([rank for rank, _ in tok.merges.values()], np.int32)
        self.ranks = Table(np.uint64)
        self.ranks.add(keys, ranks)
        self.merged = np.zeros(ranks.max(initial=-1) + 1, np.int32)
        self.merged[ranks] = [merged for _, merged in tok.merges.values()]
        self._forget()

    def _forget(self) -> None:
        """Start with an empty memory of parts."""
        self.store = WordStore()  # part -> row
        self.offsets = np.zeros(0, np.int64)  # where the ids of each row begin in `ids`
        self.sizes = np.zeros(0, np.int64)  # how many ids each row has
        self.ids = np.zeros(1 << 16, np.int32)  # of all parts in a row, with room to grow
        self.used = 0  # ids in use

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each text, int32. Added tokens are not looked for."""
        if not texts:
            return []
        codes = codes_of([self.level.normalized(text) for text in texts])
        begins = np.flatnonzero(self._part_begins(codes, self.level.starts(codes)))
        ends = np.append(begins[1:], len(codes))
        is_part = codes.take(begins) != BREAK  # the others are the BREAKs that end the texts
        if len(self.store) > MOST_PARTS:
            self._forget()
        rows = self.store.rows_of(codes, begins[is_part], ends[is_part])
        self._learn_new_parts()
        sizes = self.sizes.take(rows)
        ids = self.ids.take(spread(self.offsets.take(rows), sizes))
        all_sizes = np.zeros(len(begins), np.int64)  # a BREAK has no ids
        all_sizes[is_part] = sizes
        ends_of_texts = np.cumsum(all_sizes)[~is_part]
        return np.split(ids, ends_of_texts[:-1])

    # ---- 1. Borders: where words are cut into parts

    def _note_tokens(self, tokens) -> None:
        """Fill the two sieves and the table of torn characters, from the bytes of all tokens.

        The token 感冒 lies across one border, 感|冒; the sieve of pairs notes it. The token 多喝水
        lies across two borders, 多|喝 and 喝|水. The sieve of triples notes 多喝水, but the sieve
        of pairs does not note 多喝 or 喝水: so 多喝 can still be cut where no 水 follows. A longer
        token is noted as all its triples.

        At byte level a token may tear a character: hold only some of its bytes. 感 is E6 84 9F and
        冒 is E5 86 92; a token 9F E5 lies across the border 感|冒 and across every other border
        between a character that ends in 9F and one that begins with E5. `torn` notes it:

            last byte of 感, first byte of 冒        torn[0x9F, 0xE5] = True
        """
        pairs = []
        triples = []
        for token in tokens:
            try:
                text = token.decode()
            except UnicodeDecodeError:
                for before, after in pairwise(token):
                    if (after & 0xC0) != 0x80:  # `after` is the first byte of a character
                        self.torn[before, after] = True
                continue
            if not self.is_byte_level:
                text = text.replace(" ", "▁")
            if len(text) == 2:
                pairs.append(tuple(map(ord, text)))
            triples += [tuple(map(ord, text[i : i + 3])) for i in range(len(text) - 2)]
        for sieve, groups in ((self.pairs, pairs), (self.triples, triples)):
            if groups:
                sieve[sieve_cells(*np.array(groups, np.uint32).T)] = True

    def _part_begins(self, codes: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """Where a part begins: a word starts, or no token reaches across the border before it.

        starts: (N,) bool, where words start. Returns (N,) bool.
        """
        crossed = np.zeros(len(codes), bool)  # whether a token may reach across the border before
        narrow = codes.astype(np.uint32)
        crossed[1:] = self.pairs.take(sieve_cells(narrow[:-1], narrow[1:]))
        triples = self.triples.take(sieve_cells(narrow[:-2], narrow[1:-1], narrow[2:]))
        crossed[1:-1] |= triples  # the border before the second character of a triple
        crossed[2:] |= triples  # and the one before the third
        crossed &= ~starts
        uncrossed = np.flatnonzero(~(crossed | starts)[1:]) + 1
        is_torn = self._may_be_torn(codes.take(uncrossed - 1), codes.take(uncrossed))
        crossed[uncrossed[is_torn]] = True
        return ~crossed

    def _may_be_torn(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """Whether a token that tears a character may lie across the border of two characters."""
        first, last = outer_bytes()
        return self.torn[last.take(before), first.take(after)]

    # ---- 2. Parts: three ways to encode the new ones

    def _learn_new_parts(self) -> None:
        """Encode the parts that came into the store since the last call.

        There are three kinds of parts:

            easy          every character is a token, and no token can tear one of them
            by bytes      the other parts at byte level
            one by one    the other parts at char level, which hold an [UNK] or fall back to bytes;
                          parts longer than LONGEST_IN_ROUNDS, which would take many rounds

        Easy parts are merged in rounds from characters on, parts by bytes from bytes on. Merges
        within a character come out the same whatever stands beside it, so where no token can tear
        a character, merging may begin with the tokens of whole characters.
        """
        known = len(self.sizes)
        if known == len(self.store):
            return
        codes, lengths = self.store.words_from(known)
        begins = begins_of(lengths)
        tokens = self._tokens_of_characters(codes)
        is_easy = self._easy_parts(tokens, codes, begins)
        is_short = lengths <= LONGEST_IN_ROUNDS
        by_characters = is_easy & is_short
        by_bytes = ~is_easy & is_short
        if not self.is_byte_level:
            by_bytes[:] = False
        one_by_one = ~(by_characters | by_bytes)
        encoded = self._encode_by_characters(np.flatnonzero(by_characters), tokens, begins, lengths)
        encoded += self._encode_by_bytes(np.flatnonzero(by_bytes), codes, begins, lengths)
        encoded += self._encode_one_by_one(np.flatnonzero(one_by_one), codes, begins, lengths)
        self._remember(encoded)

    def _tokens_of_characters(self, codes: np.ndarray) -> np.ndarray:
        """The id of each character that is one token, otherwise NOT_ONE_TOKEN: (N,) int32."""
        for code in np.unique(codes[self.character_ids.take(codes) == NOT_SEEN]).tolist():
            ids = self.encode_word(chr(code))
            self.character_ids[code] = ids[0] if len(ids) == 1 else NOT_ONE_TOKEN
        return self.character_ids.take(codes)

    def _easy_parts(self, tokens, codes, begins) -> np.ndarray:
        """Whether every character of a part is a token, and no token can tear one: (P,) bool."""
        no_token = tokens == NOT_ONE_TOKEN
        is_hard = no_token.copy()
        is_hard[1:] |= self._may_be_torn(codes[:-1], codes[1:])
        is_hard[begins] = no_token[begins]  # the character before belongs to another part
        return ~np.logical_or.reduceat(is_hard, begins)

    def _encode_by_characters(self, parts, tokens, begins, lengths) -> list[Encoded]:
        """Merge parts from the tokens of their characters on."""
        tokens = values_of(parts, tokens, begins, lengths)
        return self._merge_in_rounds(parts, lengths[parts], tokens)

    def _encode_by_bytes(self, parts, codes, begins, lengths) -> list[Encoded]:
        """Merge parts from the tokens of their bytes on."""
        if len(parts) == 0:
            return []
        characters = values_of(parts, codes, begins, lengths).astype(np.uint32)
        sizes = np.add.reduceat(byte_counts(characters), begins_of(lengths[parts]))
        tokens = self.byte_ids.take(self.level.symbol_codes(characters))
        return self._merge_in_rounds(parts, sizes, tokens)

    def _encode_one_by_one(self, parts, codes, begins, lengths) -> list[Encoded]:
        """Encode parts with the tokenizer's own `encode_word`."""
        encoded = []
        for part in parts.tolist():
            characters = codes[begins[part] : begins[part] + lengths[part]]
            ids = np.array(self.encode_word("".join(map(chr, characters.tolist()))), np.int32)
            encoded.append((np.array([part]), np.array([len(ids)]), ids))
        return encoded

    def _remember(self, encoded: list[Encoded]) -> None:
        """Append the ids of new parts, and note where those of each part begin."""
        parts = np.concatenate([numbers for numbers, _, _ in encoded])
        sizes = np.concatenate([sizes for _, sizes, _ in encoded])
        ids = np.concatenate([ids for _, _, ids in encoded])
        needed = self.used + len(ids)
        if needed > len(self.ids):
            room = np.zeros(self.used + 2 * len(ids), np.int32)
            self.ids = np.append(self.ids[: self.used], room)
        self.ids[self.used : needed] = ids
        in_order = np.argsort(parts)
        offsets = self.used + begins_of(sizes)
        self.offsets = np.append(self.offsets, offsets[in_order])
        self.sizes = np.append(self.sizes, sizes[in_order])
        self.used = needed

    # ---- 3. Merging in rounds

    def _merge_in_rounds(self, parts, sizes, tokens) -> list[Encoded]:
        """Merge many parts side by side, until nothing is left to merge.

        parts: numbers of the parts. sizes: how many tokens each part has. tokens: the tokens of all
        parts in a row. Each round merges one pair of every part: the best-ranked, and among equals
        the leftmost. With the merges (a, b) -> X of rank 0 and (X, c) -> Y of rank 1:

            round    tokens          best pair of each part
            1        a b c | c a     (a, b)    none: the second part is finished
            2        X c             (X, c)
            3        Y               none: the first part is finished

        Returns the finished parts of each round.
        """
        finished = []
        while len(parts):
            begins = begins_of(sizes)
            ranks = self._ranks_of_pairs(tokens, begins)
            best = np.minimum.reduceat(ranks, begins)

            is_over = best == NO_PAIR
            is_of_over = np.repeat(is_over, sizes)
            finished.append((parts[is_over], sizes[is_over], tokens[is_of_over]))
            parts = parts[~is_over]
            sizes = sizes[~is_over]
            best = best[~is_over]
            tokens = tokens[~is_of_over]
            ranks = ranks[~is_of_over]

            part_of_token = np.repeat(np.arange(len(parts)), sizes)
            at = np.flatnonzero(ranks == best.take(part_of_token))
            part_of_pair = part_of_token.take(at)
            is_leftmost = np.ones(len(at), bool)
            is_leftmost[1:] = part_of_pair[1:] != part_of_pair[:-1]
            at = at[is_leftmost]

            tokens[at] = self.merged.take(ranks.take(at))
            stays = np.ones(len(tokens), bool)
            stays[at + 1] = False
            tokens = tokens[stays]
            sizes = sizes - 1
        return finished

    def _ranks_of_pairs(self, tokens: np.ndarray, begins: np.ndarray) -> np.ndarray:
        """The rank of each token with the token after it in its part; otherwise NO_PAIR."""
        left = tokens[:-1].astype(np.uint64)
        right = tokens[1:].astype(np.uint64)
        ranks = self.ranks.find((left << np.uint64(32)) | right)
        ranks = np.append(np.where(ranks < 0, NO_PAIR, ranks), NO_PAIR)
        ranks[begins[1:] - 1] = NO_PAIR  # the token after belongs to another part
        return ranks
