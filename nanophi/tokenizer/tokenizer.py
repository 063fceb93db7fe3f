"""BPE: text <-> token ids, and the tokenizer.json that every engine reads.

    text --split--> words (pre-tokens) --level--> symbols (bytes or characters) --merges--> ids

The vocabulary holds tokens as tokenizer.json spells them: at byte level with GPT-2's 256 stand-in characters (one
printable character a byte, so that a Chinese character shows as three of them), at char level as they are, "▁" being a
space. text/levels.py has what differs between the two. The ids are those of HF tokenizers on the same file. At byte
level all 256 bytes are always in the vocabulary, so any text survives the round trip.

Special tokens are recognised in text only where the caller asks (`specials=True`): a user who types [EOS] gets its
five characters. Tokens added with `add_tokens` are always recognised, as in HF.
"""

import hashlib
import heapq
import json
from collections.abc import Collection, Iterable, Iterator
from functools import cached_property
from itertools import compress, pairwise
from pathlib import Path

import numpy as np

from nanophi.cli import UserError
from nanophi.files import utf8, write_json
from nanophi.tokenizer.levels import BYTE_TOKENS, Level, level_of, misshapen
from nanophi.tokenizer.template import DEFAULT, TEMPLATES, template_of

SPECIAL_TOKENS = [
    "[PAD]",
    "[EOS]",
    "[SEP]",
    "[BOS]",
    "[CLS]",
    "[MASK]",
    "[UNK]",
]  # ids 0 to 6, the original's order

FEW_CHARACTERS = 4096  # below this a batch is encoded text by text: numpy would only cost its calls
MEMO_LENGTH = 100  # characters of a word that is worth remembering
MEMO_ENTRIES = 200_000  # pre-tokens whose ids are remembered; about 60 MB


def _split_at(tokens: Collection[str], text: str) -> list[str]:
    """Cut `text` before and after every occurrence of a token, the longest first: ("ab",), "xabx" -> x, ab, x."""
    import regex

    if not tokens:
        return [text]
    return regex.split(
        f"({'|'.join(regex.escape(t) for t in sorted(tokens, key=len, reverse=True))})", text
    )


class Tokenizer:
    """`vocab` maps each ordinary token's spelling to its id; `merges` maps a pair of ids to (rank, merged id)."""

    template = (
        DEFAULT  # the chat template, a name of template.TEMPLATES; it is saved with the tokenizer
    )

    def __init__(self, level: Level, tokens: list[str], merges: list[tuple[int, int]]):
        """tokens: the ordinary tokens, with ids behind the special ones; merges: pairs of ids, most frequent first."""
        self.level = level
        self.added = {
            text: i for i, text in enumerate(SPECIAL_TOKENS)
        }  # text -> id, of special and later added ones
        self.specials = set(SPECIAL_TOKENS)
        self.vocab = {token: i for i, token in enumerate(tokens, start=len(SPECIAL_TOKENS))}
        self.merge_list = list(merges)
        self.merge_counts: list[
            int
        ] = []  # how often each pair stood there when it was merged, known after training
        self._index()

    def _index(self) -> None:
        self.spelling = {i: token for token, i in self.vocab.items()}
        self.id_to_bytes = {i: self.level.bytes_of(token) for i, token in self.spelling.items()}
        # An added token that was a token before keeps what that stands for, as in HF.
        self.id_to_bytes |= {
            i: utf8(text) for text, i in self.added.items() if i not in self.spelling
        }
        self._size = max(self.id_to_bytes, default=-1) + 1
        self.merges = {
            (left, right): (rank, self.vocab[self.spelling[left] + self.spelling[right]])
            for rank, (left, right) in enumerate(self.merge_list)
        }
        # The tokens recognised in any text are looked for after normalization, as HF does it.
        self.always = {
            self.level.normalized(text): i
            for text, i in self.added.items()
            if text not in self.specials
        }
        self._memo: dict[str, list[int]] = {}
        self._encoder = None  # for batches, made when first used
        self.__dict__.pop("fingerprint", None)

    def __len__(self) -> int:
        """One more than the largest id; a vocabulary from elsewhere may have gaps."""
        return self._size

    def special_id(self, text: str) -> int:
        """The id of a special token: `tok.special_id("[SEP]")`."""
        if text not in self.added:
            raise UserError(
                f"this tokenizer has no {text}; its added tokens are {', '.join(self.added) or 'none'}"
            )
        return self.added[text]

    @property
    def eos_id(self) -> int:
        return self.special_id("[EOS]")

    @property
    def bos_id(self) -> int:
        return self.special_id("[BOS]")

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change when any id changes; shards and training states carry it."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]

    # Encoding

    def encode(self, text: str, specials: bool = False) -> list[int]:
        """Text -> ids, nothing added at either end. specials: also recognise [EOS] and its like in the text."""
        utf8(text)  # refuses what is no text
        ids = []
        for part in _split_at(self.specials if specials else (), text):
            if specials and part in self.specials:
                ids.append(self.added[part])
            else:
                for piece in _split_at(self.always, self.level.normalized(part)):
                    ids.extend(
                        [self.always[piece]] if piece in self.always else self._ordinary(piece)
                    )
        return ids

    def encode_batch(self, texts: Iterable[str], specials: bool = False) -> list[list[int]]:
        """`encode` for each text, many together in numpy."""
        return [ids.tolist() for ids in self.encode_stream(texts, specials)]

    def encode_stream(self, texts: Iterable[str], specials: bool = False) -> Iterator[np.ndarray]:
        """`encode_batch` as arrays, one after the other; texts may stream in."""
        from nanophi.parallel import batches
        from nanophi.tokenizer.fast.encoder import BatchEncoder
        from nanophi.tokenizer.fast.words import BLOCK_CHARACTERS

        raw_sought = self.specials if specials else ()
        for block in batches(texts, BLOCK_CHARACTERS):
            if sum(map(len, block)) < FEW_CHARACTERS:
                yield from (np.array(self.encode(text, specials), np.int32) for text in block)
                continue
            self._encoder = self._encoder or BatchEncoder(self)
            plain = [
                not any(token in text for token in raw_sought)
                and not (
                    self.always and any(map(self.level.normalized(text).__contains__, self.always))
                )
                for text in block
            ]
            together = iter(self._encoder.encode(list(compress(block, plain))))
            for text, is_plain in zip(block, plain, strict=True):
                yield (
                    next(together) if is_plain else np.array(self.encode(text, specials), np.int32)
                )

    def encode_with_offsets(
        self, text: str, specials: bool = False
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """ids, and for each the characters [start, stop) that it stands for, in the normalized text; of a character
        that several tokens share, each has the whole."""
        ids, text = self.encode(text, specials), self.level.normalized(text)
        starts = np.repeat(
            np.arange(len(text)), [len(char.encode()) for char in text]
        )  # the character of each byte
        unknown, at, sizes = self.added.get("[UNK]"), 0, []
        for i in ids:
            size = len(self.id_to_bytes[i])
            if (
                i == unknown and self.level.name == "char"
            ):  # stands for one character, whatever its bytes
                size = len(text[starts[at]].encode())
            elif self.level.name == "char":
                size += 2 * self.id_to_bytes[i].count(
                    b" "
                )  # "▁" has three bytes in the normalized text
            sizes.append(size)
            at += size
        ends = np.cumsum(sizes, dtype=np.int64)
        begins = ends - sizes
        return ids, [
            (int(starts[a]), int(starts[b - 1]) + 1) for a, b in zip(begins, ends, strict=True)
        ]

    def _ordinary(self, text: str) -> list[int]:
        ids = []
        for word in self.level.words(text):
            found = self._memo.get(word)
            if found is None:
                found = self.encode_word(word)
                if len(self._memo) >= MEMO_ENTRIES:
                    self._memo.clear()
                if len(word) <= MEMO_LENGTH:
                    self._memo[word] = found
            ids.extend(found)
        return ids

    def encode_word(self, word: str) -> list[int]:
        """The ids of one word of the split, or of a part of it that no token reaches out of."""
        return self._merge([i for symbol in self.level.symbols(word) for i in self._start(symbol)])

    def _start(self, symbol: str) -> list[int]:
        """A symbol's id; for a character that is no token its bytes' ids where there are such tokens, else [UNK]."""
        if symbol in self.vocab:
            return [self.vocab[symbol]]
        if self.level.byte_fallback:
            return [self.vocab[BYTE_TOKENS[byte]] for byte in utf8(symbol)]
        return [self.vocab["[UNK]"] if "[UNK]" in self.vocab else self.special_id("[UNK]")]

    def _merge(self, ids: list[int]) -> list[int]:
        """Apply the merges to one pre-token: always the best-ranked pair present, the leftmost first among equals.

        A linked list and a heap of candidate pairs, O(n log n): a run of 10,000 spaces is no trap. An entry of the
        heap is stale when its pair is gone; that shows because its ids no longer stand there.
        """
        n = len(ids)
        previous, following = list(range(-1, n - 1)), list(range(1, n + 1))
        heap = [
            (*self.merges[pair], i) for i, pair in enumerate(pairwise(ids)) if pair in self.merges
        ]
        heapq.heapify(heap)
        while heap:
            rank, merged, left = heapq.heappop(heap)
            right = following[left] if ids[left] >= 0 else n
            if right == n or self.merges.get((ids[left], ids[right]), (None,))[0] != rank:
                continue
            ids[left], ids[right] = merged, -1  # -1: swallowed by its left neighbour
            following[left] = after = following[right]
            if after < n:
                previous[after] = left
            for start, end in ((previous[left], left), (left, after)):
                if start >= 0 and end < n and (found := self.merges.get((ids[start], ids[end]))):
                    heapq.heappush(heap, (*found, start))
        return [i for i in ids if i >= 0]

    # Decoding

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Ids -> the exact bytes."""
        try:
            return b"".join([self.id_to_bytes[int(i)] for i in ids])
        except KeyError as error:
            raise UserError(
                f"no token has the id {error}; the largest is {len(self) - 1}"
            ) from None

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Ids -> text; bytes that are no UTF-8 become U+FFFD."""
        hidden = {self.added[text] for text in self.specials} if skip_special_tokens else ()
        return self.decode_bytes(i for i in ids if int(i) not in hidden).decode("utf-8", "replace")

    def byte_lengths(self) -> list[int]:
        """Bytes of text that each id stands for, by id; special tokens stand for none."""
        special = {self.added[text] for text in self.specials}
        return [0 if i in special else len(self.id_to_bytes.get(i, b"")) for i in range(len(self))]

    def add_tokens(self, texts: list[str]) -> int:
        """Recognise these in any text from now on, appending what is no token yet; returns how many were not added
        before. A model has to follow: `model.set_vocabulary(len(tok))`."""
        before, free = len(self.added), len(self)
        for text in texts:
            utf8(text)
        for text in texts:
            if text and text not in self.added:
                self.added[text] = self.vocab.get(text, free)  # HF too gives "cat" the id it has
                free = max(free, self.added[text] + 1)
        self._index()
        return len(self.added) - before

    # Files

    def to_dict(self) -> dict:
        """The tokenizer.json of HF tokenizers."""
        as_first = {text: i for text, i in self.added.items() if text in self.specials}
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {
                    "id": i,
                    "content": text,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": text not in self.specials,
                    "special": text in self.specials,
                }
                for text, i in sorted(self.added.items(), key=lambda item: item[1])
            ],
            **self.level.settings(),
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": "[UNK]" if self.level.name == "char" else None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": self.level.byte_fallback,
                "ignore_merges": False,
                "vocab": as_first | self.vocab,
                "merges": [[self.spelling[i] for i in pair] for pair in self.merge_list],
            },
        }

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json, as AutoTokenizer 4.57 and 5 read."""
        directory = Path(directory)
        roles = {
            f"{name.strip('[]').lower()}_token": name
            for name in SPECIAL_TOKENS
            if name in self.specials  # [PAD] -> pad_token
        }
        write_json(directory / "tokenizer.json", self.to_dict())
        write_json(directory / "special_tokens_map.json", roles)
        config = {
            # Without a class, or with GPT-2's, transformers 5 rebuilds the splitting and gives other ids.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "chat_template": TEMPLATES[self.template].jinja,
        }
        write_json(directory / "tokenizer_config.json", config | roles)

    @classmethod
    def load(cls, directory: str | Path) -> "Tokenizer":
        """Read the tokenizer.json of a directory that `save`, or HF tokenizers with the same settings, wrote."""
        path = Path(directory) / "tokenizer.json"
        if not path.exists():
            raise UserError(
                f"no tokenizer.json in {directory}; python train_tokenizer.py --out {directory} writes one"
            )
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is no JSON: {error}") from None
        if fault := misshapen(data):
            raise UserError(f"{path} is no tokenizer.json: {fault}")
        level = level_of(data, path)
        model, added = data["model"], sorted(data["added_tokens"], key=lambda token: token["id"])
        added = [token for token in added if token["content"]]
        for token in added:
            if model["vocab"].get(token["content"], token["id"]) != token["id"]:
                raise UserError(
                    f"{path}: {token['content']} has one id in the vocabulary and another in added_tokens"
                )
        specials = {token["content"] for token in added if token["special"]}
        vocab = {token: i for token, i in model["vocab"].items() if token not in specials}
        if missing := set(level.alphabet([])) - vocab.keys():
            raise UserError(
                f"{path}: {len(missing)} of the 256 bytes are missing from the vocabulary"
            )
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        try:
            merges = [(model["vocab"][left], model["vocab"][right]) for left, right in pairs]
            tok = cls.of_parts(
                level, {token["content"]: token["id"] for token in added}, specials, vocab, merges
            )
        except KeyError as error:
            raise UserError(f"{path}: tokens and merges do not fit together, at {error}") from None

        tok.template = template_of(_jinja_of(Path(directory) / "tokenizer_config.json"))
        return tok

    @classmethod
    def of_parts(
        cls, level: Level, added: dict, specials: set, vocab: dict, merges: list
    ) -> "Tokenizer":
        """A tokenizer whose ids are given, not numbered here: added and vocab are {spelling: id}."""
        tok = cls.__new__(cls)
        tok.level, tok.added, tok.specials = level, added, specials
        tok.vocab = dict(sorted(vocab.items(), key=lambda item: item[1]))
        tok.merge_list, tok.merge_counts = merges, []
        tok._index()
        return tok


def _jinja_of(path: Path) -> str | None:
    """The chat template that a tokenizer_config.json holds; None where there is no such file or none in it."""
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("chat_template")
    except (OSError, ValueError, AttributeError):
        return None
