"""The tokenizer: text -> token ids -> text.

    text        "感冒了，don't"
    words       "感冒了" "，" "don" "'t"                  the level's split (levels.py, splits.py)
    symbols     "感冒了" -> æ Ħ Ł å Ĩ Ĵ ä º Ĩ             bytes, or characters (levels.py)
    ids         æ Ħ Ł å Ĩ Ĵ ä º Ĩ -> 感冒 了 -> 261 340    the merges, best rank first (merge_word)

The ids are those of HF tokenizers on the same tokenizer.json. At byte level all 256 bytes are in
the vocabulary, so any text survives the round trip.

Two sorts of tokens do not come from merging:

    special tokens   such as [EOS]. They are recognised in a text only if the caller asks for it
                     (`specials=True`): a user who types [EOS] gets its five characters.
    added tokens     from `add_tokens`. They are always recognised, as in HF.

Read in this order: `merge_word`, which is `encode_word_naive` of bpe.py made fast; then the class:
encoding, decoding, adding tokens. hf_json.py reads and writes the files, and nanophi/tokenizer/fast
encodes many texts at once.
"""

import hashlib
import heapq
import json
import operator
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from nanophi.cli import SHOWN, UserError
from nanophi.expect import Expected, check, shown
from nanophi.files import utf8
from nanophi.tokenizer.levels import BYTE_TOKENS, Level
from nanophi.tokenizer.template import DEFAULT

# The original's special tokens in its order: ids 0 to 6.
SPECIAL_TOKENS = ["[PAD]", "[EOS]", "[SEP]", "[BOS]", "[CLS]", "[MASK]", "[UNK]"]

# A larger id is refused in files: what has one entry for each id would fill the memory.
LARGEST_ID = 2**24 - 1

FEW_CHARACTERS = 4096  # a smaller batch is encoded text by text: calling numpy would cost more
MEMO_LENGTH = 100  # characters; the ids of longer words are not remembered
MEMO_ENTRIES = 200_000  # words whose ids are remembered; about 60 MB
SHOWN_TOKENS = 20  # added tokens in a `repr`

Pair = tuple[int, int]


def merge_word(ids: Sequence[int], merges: Mapping[Pair, tuple[int, int]]) -> list[int]:
    """Merge the symbols of one word: the best-ranked adjacent pair each time, the leftmost first.

    merges: pair -> (rank, id of the merged token). It gives what `encode_word_naive` of bpe.py
    gives, in O(n log n) steps, so that a run of 10,000 spaces takes no longer than other text.

    The candidates lie in a heap, and the ids in a linked list. When a pair is merged, its left id
    becomes the new token and its right id is swallowed:

        merges     a a -> X (rank 0),  X X -> Y (rank 1)

        index          0  1  2  3      heap: (rank, new id, index)
        ids            a  a  a  a      (0, X, 0) (0, X, 1) (0, X, 2)
        pop (0, X, 0)  X  .  a  a      X a is no pair of merges: nothing to push
        pop (0, X, 1)  X  .  a  a      index 1 is swallowed: the entry is stale and is dropped
        pop (0, X, 2)  X  .  X  .      X X has rank 1: push (1, Y, 0)
        pop (1, Y, 0)  Y  .  .  .

    Stale entries are not searched for. An entry is stale if the ids at its index are no longer a
    pair of its rank.

    >>> merge_word([7, 7, 7, 7], {(7, 7): (0, 8), (8, 8): (1, 9)})
    [9]
    """
    n = len(ids)
    swallowed = -1
    merged_ids = list(ids)
    previous = list(range(-1, n - 1))  # index of the left neighbour; -1: there is none
    following = list(range(1, n + 1))  # index of the right neighbour; n: there is none
    heap = [(*merges[pair], i) for i, pair in enumerate(pairwise(ids)) if pair in merges]
    heapq.heapify(heap)
    while heap:
        rank, merged, left = heapq.heappop(heap)
        right = following[left]
        if merged_ids[left] == swallowed or right == n:
            continue
        present = merges.get((merged_ids[left], merged_ids[right]))
        if present is None or present[0] != rank:
            continue
        after = following[right]
        before = previous[left]
        merged_ids[left] = merged
        merged_ids[right] = swallowed
        following[left] = after
        if before >= 0:
            candidate = merges.get((merged_ids[before], merged))
            if candidate is not None:
                heapq.heappush(heap, (*candidate, before))
        if after < n:
            previous[after] = left
            candidate = merges.get((merged, merged_ids[after]))
            if candidate is not None:
                heapq.heappush(heap, (*candidate, left))
    return [i for i in merged_ids if i != swallowed]


class Tokenizer:
    """Encodes text into ids and decodes ids into text.

    level          ByteLevel, CharLevel or PieceLevel
    vocab          spelling of each ordinary token -> id
    spelling       id -> spelling of each ordinary token
    id_to_bytes    id -> the bytes that the token stands for; special and added tokens too
    merge_list     the merges as pairs of ids, in order
    merges         pair of ids -> (rank, id of the merged token)
    merge_counts   how often each pair occurred when it was merged; known only after training
    added          text -> id of the special tokens and the added ones
    specials       those of `added` that are special
    always         normalized text -> id of those of `added` that are not special
    template       name of the chat template in template.TEMPLATES; it is saved with the tokenizer
    unknown_jinja  a chat template that TEMPLATES lacks; it is saved as it was read

    >>> from nanophi.tokenizer.levels import ByteLevel
    >>> level = ByteLevel()
    >>> alphabet = level.alphabet([])
    >>> h, i = (7 + alphabet.index(char) for char in "hi")
    >>> tok = Tokenizer(level, [*alphabet, "hi"], [(h, i)])
    >>> tok  # doctest: +NORMALIZE_WHITESPACE
    Tokenizer(264 tokens, ByteLevel(split='gpt2', nfc=False), template 'wenda', 7 special or added:
        [PAD] [EOS] [SEP] [BOS] [CLS] [MASK] [UNK])
    >>> tok.encode("hi[EOS]"), tok.encode("hi[EOS]", specials=True)
    ([263, 65, 43, 53, 57, 67], [263, 1])
    >>> tok.decode([263, 1]), tok.decode([263, 1], skip_special_tokens=True)
    ('hi[EOS]', 'hi')
    """

    def __init__(
        self,
        level: Level,
        tokens: Iterable[str],
        merges: Iterable[Pair],
        merge_counts: Iterable[int] = (),
    ):
        """Number the tokens: SPECIAL_TOKENS come first, then `tokens`, the ordinary ones.

        tokens: their spellings. merges: pairs of ids, the most frequent first.
        """
        self.level = level
        self.added = {text: i for i, text in enumerate(SPECIAL_TOKENS)}
        self.specials = set(SPECIAL_TOKENS)
        self.vocab = {token: i for i, token in enumerate(tokens, start=len(SPECIAL_TOKENS))}
        self.merge_list = list(merges)
        self.merge_counts = list(merge_counts)
        self.template = DEFAULT
        self.unknown_jinja: Any = None
        self._index()

    @classmethod
    def of_parts(
        cls,
        level: Level,
        added: dict[str, int],
        specials: set[str],
        vocab: dict[str, int],
        merges: list[Pair],
    ) -> "Tokenizer":
        """A tokenizer whose ids are given instead of numbered here; the parts are attributes."""
        tok = cls(level, [], [])
        tok.added = added
        tok.specials = specials
        tok.vocab = dict(sorted(vocab.items(), key=lambda item: item[1]))
        tok.merge_list = merges
        tok._index()
        return tok

    def _index(self) -> None:
        """Compute what follows from level, vocab, added, specials and merge_list."""
        self.spelling = {i: token for token, i in self.vocab.items()}
        self.id_to_bytes = {i: self.level.bytes_of(token) for i, token in self.spelling.items()}
        self.always: dict[str, int] = {}
        for text, i in self.added.items():
            if i not in self.spelling:  # otherwise it keeps the bytes of its spelling, as in HF
                self.id_to_bytes[i] = utf8(text)
            if text not in self.specials:
                # HF looks for these tokens after normalization.
                self.always[self.level.normalized(text)] = i
        self._size = max(self.id_to_bytes, default=-1) + 1
        self.merges = {}
        for rank, (left, right) in enumerate(self.merge_list):
            merged = self.vocab[self.spelling[left] + self.spelling[right]]
            self.merges[left, right] = (rank, merged)
        self._memo: dict[str, list[int]] = {}  # word -> its ids
        self._encoder: Any = None  # the BatchEncoder, made when it is first used
        self.__dict__.pop("fingerprint", None)

    def __len__(self) -> int:
        """The largest id + 1. A vocabulary from elsewhere may have gaps below it."""
        return self._size

    def __repr__(self) -> str:
        shown = list(self.added)[:SHOWN_TOKENS]
        if len(self.added) > SHOWN_TOKENS:
            shown.append("...")
        return (
            f"Tokenizer({len(self)} tokens, {self.level}, template {self.template!r}, "
            f"{len(self.added)} special or added: {' '.join(shown)})"
        )

    def special_id(self, text: str) -> int:
        """The id of a special or added token: `tok.special_id("[SEP]")`."""
        check(text, Expected(str), "the name of a special token")
        if text not in self.added:
            raise UserError(
                f"this tokenizer has no {text[:SHOWN]}; "
                f"its added tokens are {', '.join(self.added) or 'none'}"
            )
        return self.added[text]

    @property
    def eos_id(self) -> int:
        """The id of [EOS]."""
        return self.special_id("[EOS]")

    @property
    def bos_id(self) -> int:
        """The id of [BOS]."""
        return self.special_id("[BOS]")

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change when any id changes. Shards and training states carry it."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]

    # ---- Encoding one text

    def encode(self, text: str, specials: bool = False) -> list[int]:
        """Text -> ids. Nothing is added at either end.

        specials: recognise special tokens such as [EOS] in the text, too. Raises a UserError if the
        text holds half of a surrogate pair.
        """
        if not isinstance(text, str):
            raise UserError(
                f"encode takes one string, not a value of type {type(text).__name__}; "
                "encode_batch takes a list of strings"
            )
        utf8(text)  # refuses half of a surrogate pair
        if not specials:
            return self._encode_part(text)
        ids = []
        for part in split_at(self.specials, text):
            if part in self.specials:
                ids.append(self.added[part])
            else:
                ids.extend(self._encode_part(part))
        return ids

    def _encode_part(self, text: str) -> list[int]:
        """The ids of a text without special tokens; added tokens are recognised."""
        normalized = self.level.normalized(text)
        if not self.always:
            return self._encode_ordinary(normalized)
        ids = []
        for part in split_at(self.always, normalized):
            if part in self.always:
                ids.append(self.always[part])
            else:
                ids.extend(self._encode_ordinary(part))
        return ids

    def _encode_ordinary(self, normalized: str) -> list[int]:
        """The ids of a normalized text without any special or added token, word by word."""
        ids = []
        for word in self.level.words(normalized):
            word_ids = self._memo.get(word)
            if word_ids is None:
                word_ids = self.encode_word(word)
                if len(self._memo) >= MEMO_ENTRIES:
                    self._memo.clear()
                if len(word) <= MEMO_LENGTH:
                    self._memo[word] = word_ids
            ids.extend(word_ids)
        return ids

    def encode_word(self, word: str) -> list[int]:
        """The ids of one word, or of a part of it whose border no token can cross."""
        ids = []
        for symbol in self.level.symbols(word):
            i = self.vocab.get(symbol)
            if i is None:
                ids.extend(self._ids_of_unknown(symbol))
            else:
                ids.append(i)
        return merge_word(ids, self.merges)

    def _ids_of_unknown(self, character: str) -> list[int]:
        """A character that is no token: its bytes if there is a fallback, otherwise [UNK]."""
        if self.level.byte_fallback:
            return [self.vocab[BYTE_TOKENS[byte]] for byte in utf8(character)]
        if "[UNK]" in self.vocab:
            return [self.vocab["[UNK]"]]
        return [self.special_id("[UNK]")]

    def encode_with_offsets(
        self, text: str, specials: bool = False
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids, and for each id the characters [start, stop) of the normalized text it covers.

        If several tokens share a character, each of them covers the whole character:

            text       感冒               characters 0 and 1, 3 bytes each
            tokens     <E6 84> <9F> 冒     the first two share 感
            offsets    (0, 1)  (0, 1)  (1, 2)
        """
        ids = self.encode(text, specials)
        normalized = self.level.normalized(text)
        widths = [len(char.encode()) for char in normalized]
        character_of_byte = np.repeat(np.arange(len(normalized)), widths)  # "a好" -> 0 1 1 1
        offsets = []
        begin = 0  # in bytes of the normalized text
        for i in ids:
            first = int(character_of_byte[begin])
            end = begin + self._bytes_covered(i, normalized[first])
            last = int(character_of_byte[end - 1])
            offsets.append((first, last + 1))
            begin = end
        return ids, offsets

    def _bytes_covered(self, token_id: int, character: str) -> int:
        """How many bytes of the normalized text a token covers that begins in this character."""
        raw = self.id_to_bytes[token_id]
        if self.level.name == "byte":
            return len(raw)
        if token_id == self.added.get("[UNK]"):
            return len(character.encode())
        return len(raw) + 2 * raw.count(b" ")  # a space is "▁" there, which has 3 bytes

    # ---- Encoding many texts

    def encode_batch(self, texts: Iterable[str], specials: bool = False) -> list[list[int]]:
        """`encode` for each text; many texts are encoded together in numpy."""
        return [ids.tolist() for ids in self.encode_stream(texts, specials)]

    def encode_stream(self, texts: Iterable[str], specials: bool = False) -> Iterator[np.ndarray]:
        """`encode_batch` that yields an int32 array for each text. The texts may stream in."""
        from nanophi.parallel import batches
        from nanophi.tokenizer.fast.words import BLOCK_CHARACTERS

        for block in batches(each_text(texts, "encode_batch"), BLOCK_CHARACTERS):
            if sum(map(len, block)) < FEW_CHARACTERS:
                for text in block:
                    yield np.array(self.encode(text, specials), np.int32)
            else:
                yield from self._encode_block(block, specials)

    def _encode_block(self, texts: list[str], specials: bool) -> Iterator[np.ndarray]:
        """Texts in which no added token occurs are encoded together, the others one by one."""
        from nanophi.tokenizer.fast.encoder import BatchEncoder

        if self._encoder is None:
            self._encoder = BatchEncoder(self)
        is_plain = [not self._holds_added_token(text, specials) for text in texts]
        plain = [text for text, is_one in zip(texts, is_plain, strict=True) if is_one]
        encoded = iter(self._encoder.encode(plain))
        for text, is_one in zip(texts, is_plain, strict=True):
            if is_one:
                yield next(encoded)
            else:
                yield np.array(self.encode(text, specials), np.int32)

    def _holds_added_token(self, text: str, specials: bool) -> bool:
        """Whether `encode` would recognise a special token (with specials) or an added one."""
        if specials and any(token in text for token in self.specials):
            return True
        if not self.always:
            return False
        normalized = self.level.normalized(text)
        return any(token in normalized for token in self.always)

    # ---- Decoding

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Ids -> the exact bytes. Raises a UserError if an id is no token."""
        return self._bytes_of(whole_numbers(ids))

    def _bytes_of(self, ids: list[int]) -> bytes:
        try:
            return b"".join([self.id_to_bytes[i] for i in ids])
        except KeyError as error:
            raise UserError(
                f"no token has the id {shown(error.args[0])}; the largest is {len(self) - 1}"
            ) from None

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Ids -> text. Bytes that are no UTF-8 become U+FFFD.

        ids: of one text; an array of numpy or a tensor will do, too.
        """
        numbers = whole_numbers(ids)
        if skip_special_tokens:
            hidden = self._special_ids()
            numbers = [i for i in numbers if i not in hidden]
        return self._bytes_of(numbers).decode("utf-8", "replace")

    def piece(self, token_id: int) -> str:
        """One token as a person reads it. Bytes that are no text by themselves show as <E6><9C>."""
        raw = self.decode_bytes([token_id])
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "".join(f"<{byte:02X}>" for byte in raw)

    def pieces(self, text: str, specials: bool = False) -> list[str]:
        """The tokens of a text, each as `piece` shows it.

        A tokenizer that knows the word 月亮 and has seen no moon as a picture:
        ["月亮", "<F0>", "<9F>", "<8C>", "<99>"] for 月亮🌙.
        """
        return [self.piece(token_id) for token_id in self.encode(text, specials)]

    def byte_lengths(self) -> list[int]:
        """For each id, how many bytes of text it stands for: 0 for special tokens and for gaps."""
        lengths = [0] * len(self)
        special = self._special_ids()
        for i, raw in self.id_to_bytes.items():
            if i not in special:
                lengths[i] = len(raw)
        return lengths

    def _special_ids(self) -> set[int]:
        return {self.added[text] for text in self.specials}

    # ---- Adding tokens

    def add_tokens(self, texts: Iterable[str], special: bool = False) -> int:
        """Recognise these texts as tokens from now on; returns how many were not added before.

        special: make them special tokens, which are recognised only with `specials=True`. A text
        that is a token of the vocabulary already keeps its id, as in HF. The others get new ids at
        the end, and a model has to follow: `model.set_vocabulary(len(tok))`.
        """
        texts = [text for text in each_text(texts, "add_tokens") if text]
        for text in texts:
            utf8(text)  # refuses half of a surrogate pair, before anything is changed
        before = len(self.added)
        free = len(self)
        for text in texts:
            if text not in self.added:
                self.added[text] = self.vocab.get(text, free)
                free = max(free, self.added[text] + 1)
        if special:
            self.specials.update(texts)
        self._index()
        return len(self.added) - before

    # ---- Files: see hf_json.py

    def to_dict(self) -> dict[str, Any]:
        """The content of tokenizer.json."""
        from nanophi.tokenizer import hf_json

        return hf_json.to_dict(self)

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json."""
        from nanophi.tokenizer import hf_json

        hf_json.save(self, directory)

    @staticmethod
    def load(directory: str | Path) -> "Tokenizer":
        """Read the tokenizer.json of a directory; `save` or HF tokenizers may have written it."""
        from nanophi.tokenizer import hf_json

        return hf_json.load(directory)


def split_at(tokens: Collection[str], text: str) -> list[str]:
    """Cut `text` before and after every occurrence of a token; the longest token goes first.

    >>> split_at(["ab", "abc"], "xabcyab")
    ['x', 'abc', 'y', 'ab', '']
    """
    import regex

    if not tokens:
        return [text]
    longest_first = sorted(tokens, key=len, reverse=True)
    pattern = "|".join(regex.escape(token) for token in longest_first)
    return regex.split(f"({pattern})", text)


# ---- Arguments


def refuse_one_string(texts: Iterable[str], function: str) -> None:
    """Refuse one string where a list of strings is expected: it would be read as its characters.

    A dict would be read as its keys.
    """
    if isinstance(texts, str | bytes | Mapping) or not isinstance(texts, Iterable):
        name = "one string" if isinstance(texts, str) else f"a {type(texts).__name__}"
        raise UserError(
            f"{function} takes a list of strings, one for each text, and not {name}; "
            f"for a single text write {function}([text])"
        )


def each_text(texts: Iterable[str], function: str) -> Iterator[str]:
    """The texts, which may stream in; a UserError at the first that is no string.

    >>> list(each_text(["一", b"x"], "encode_batch"))  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    nanophi.cli.UserError: text number 2 is of type bytes, a string was expected
    """
    refuse_one_string(texts, function)
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            raise UserError(
                f"{function}: text number {number} is of type {type(text).__name__}, "
                "a string was expected"
            )
        yield text


def whole_numbers(ids: Any) -> list[int]:
    """Ids as a list of ints: of a list, an array of numpy or a tensor.

    >>> whole_numbers(np.array([7, 9], np.int32)), whole_numbers(i for i in (7, 9))
    ([7, 9], [7, 9])
    """
    values = ids.tolist() if hasattr(ids, "tolist") else ids  # far faster than one by one
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise UserError(f"decode takes a list of ids, not {shown(ids)}")
    numbers = list(values)
    if set(map(type, numbers)) <= {int}:
        return numbers
    for place, value in enumerate(numbers):
        try:
            if isinstance(value, bool):
                raise TypeError
            numbers[place] = operator.index(value)  # an int of numpy is one, 2.5 is none
        except TypeError:
            raise UserError(
                f"decode takes a list of whole numbers, and one of them is {shown(value)}; "
                "for several texts call it once for each"
            ) from None
    return numbers


def checked_size(value: Any, name: str) -> int:
    """A whole number of at least 1, which may be one of numpy's."""
    if isinstance(value, np.integer):
        value = int(value)
    check(value, Expected(int, at_least=1), name)
    return value
