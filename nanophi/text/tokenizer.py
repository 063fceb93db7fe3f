"""Byte-level BPE: text <-> token ids, and the tokenizer.json that every engine reads.

    text --split--> pre-tokens --UTF-8--> bytes --merges--> ids

A token is a byte string. tokenizer.json spells it with GPT-2's 256 stand-in characters (one printable character a
byte, so that a Chinese character shows as three of them); inside this class it is plain bytes. The ids are those of HF
tokenizers on the same file, and all 256 bytes are always in the vocabulary, so any text survives the round trip.

Special tokens are recognised in text only where the caller asks (`specials=True`): a user who types [EOS] gets its
five characters. Tokens added with `add_tokens` are always recognised, as in HF.
"""

import hashlib
import heapq
import json
from collections.abc import Collection, Iterable
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from nanophi.cli import UserError
from nanophi.files import write_json
from nanophi.text.chat import JINJA_TEMPLATE

SPECIAL_TOKENS = ["[PAD]", "[EOS]", "[SEP]", "[BOS]", "[CLS]", "[MASK]", "[UNK]"]  # ids 0 to 6, the original's order

# GPT-2's split (Radford et al. 2019): contractions, words, numbers and symbols each with the space before, white space.
# Chinese has no spaces, so a whole clause between two punctuation marks is one pre-token.
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

MEMO_ENTRIES = 200_000  # pre-tokens whose ids are remembered; about 60 MB


def byte_characters() -> list[str]:
    """GPT-2's stand-in character of each byte value: itself where printable in Latin-1, else one from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


BYTE_TO_CHAR = byte_characters()
CHAR_TO_BYTE = {char: byte for byte, char in enumerate(BYTE_TO_CHAR)}
# The alphabet's ids follow the stand-in characters, not the byte values: that is how HF's trainer orders them.
ALPHABET = sorted(range(256), key=lambda byte: BYTE_TO_CHAR[byte])


def split_pattern():
    import regex  # here, so that the model and the training loop run without it

    return regex.compile(GPT2_SPLIT)


def _split_at(tokens: Collection[str], text: str) -> list[str]:
    """Cut `text` before and after every occurrence of a token, the longest first: ("ab",), "xabx" -> x, ab, x."""
    import regex

    if not tokens:
        return [text]
    return regex.split(f"({'|'.join(regex.escape(t) for t in sorted(tokens, key=len, reverse=True))})", text)


def _refuse_what_is_not_implemented(data: dict, path: Path) -> None:
    """A tokenizer.json with other settings would load and give other ids: better to say so."""
    splits, model = data.get("pre_tokenizer") or {}, data.get("model") or {}
    flags = [token.get(name) for token in data.get("added_tokens", []) for name in ("lstrip", "rstrip", "single_word")]
    for right, what in (
        (model.get("type") == "BPE" and splits.get("type") == "ByteLevel", "only byte-level BPE is read"),
        (splits.get("use_regex", True) and not splits.get("add_prefix_space"), "only GPT-2's split is read"),
        (not data.get("normalizer"), "a normalizer is not supported"),
        ((data.get("post_processor") or {}).get("type") in (None, "ByteLevel"), "a post-processor is not supported"),
        (not model.get("ignore_merges") and not any(flags), "ignore_merges, strip and single_word are not supported"),
    ):
        if not right:
            raise UserError(f"{path}: {what}")


class Tokenizer:
    """`vocab` maps each ordinary token's bytes to its id; `merges` maps a pair of ids to (rank, merged id)."""

    def __init__(self, tokens: list[bytes], merges: list[tuple[int, int]], specials: list[str] = SPECIAL_TOKENS):
        """tokens: the ordinary tokens, with ids from len(specials) on; merges: pairs of ids, most frequent first."""
        self.added = {text: i for i, text in enumerate(specials)}  # text -> id, of special and later added tokens
        self.specials = set(specials)
        self.vocab = {token: i for i, token in enumerate(tokens, start=len(specials))}
        self.merge_list = list(merges)
        self._index()

    def _index(self) -> None:
        self.id_to_bytes = {i: token for token, i in self.vocab.items()}
        self.id_to_bytes |= {i: text.encode() for text, i in self.added.items()}
        self.merges = {
            pair: (rank, self.vocab[self.id_to_bytes[pair[0]] + self.id_to_bytes[pair[1]]])
            for rank, pair in enumerate(self.merge_list)
        }
        missing = [byte for byte in range(256) if bytes([byte]) not in self.vocab]
        if missing:
            raise UserError(f"not a byte-level vocabulary: {len(missing)} of the 256 bytes are missing")
        self.always = self.added.keys() - self.specials  # recognised in any text
        self._memo: dict[str, list[int]] = {}
        self.__dict__.pop("fingerprint", None)

    def __len__(self) -> int:
        return len(self.id_to_bytes)

    def special_id(self, text: str) -> int:
        """The id of a special token: `tok.special_id("[SEP]")`."""
        if text not in self.added:
            raise UserError(f"this tokenizer has no {text}; its added tokens are {', '.join(self.added) or 'none'}")
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
        ids = []
        for part in _split_at(self.specials if specials else (), text):
            if specials and part in self.specials:
                ids.append(self.added[part])
            else:
                for piece in _split_at(self.always, part):
                    ids.extend([self.added[piece]] if piece in self.always else self._ordinary(piece))
        return ids

    def encode_batch(self, texts: Iterable[str], specials: bool = False) -> list[list[int]]:
        return [self.encode(text, specials) for text in texts]

    def _ordinary(self, text: str) -> list[int]:
        ids = []
        for word in self._pattern.findall(text):
            found = self._memo.get(word)
            if found is None:
                found = self._merge([self.vocab[bytes([byte])] for byte in word.encode("utf-8", "surrogatepass")])
                if len(self._memo) >= MEMO_ENTRIES:
                    self._memo.clear()
                self._memo[word] = found
            ids.extend(found)
        return ids

    @cached_property
    def _pattern(self):
        return split_pattern()

    def _merge(self, ids: list[int]) -> list[int]:
        """Apply the merges to one pre-token: always the best-ranked pair present, the leftmost first among equals.

        A linked list and a heap of candidate pairs, O(n log n): a run of 10,000 spaces is no trap. An entry of the
        heap is stale when its pair is gone; that shows because its ids no longer stand there.
        """
        n = len(ids)
        previous, following = list(range(-1, n - 1)), list(range(1, n + 1))
        heap = [(*self.merges[pair], i) for i, pair in enumerate(pairwise(ids)) if pair in self.merges]
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
        """Ids -> the exact bytes. A model may have more rows than there are tokens; such an id spells nothing."""
        return b"".join(self.id_to_bytes.get(int(i), b"") for i in ids)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Ids -> text; bytes that are no UTF-8 become U+FFFD."""
        hidden = {self.added[text] for text in self.specials} if skip_special_tokens else ()
        return self.decode_bytes(i for i in ids if int(i) not in hidden).decode("utf-8", "replace")

    def byte_lengths(self) -> list[int]:
        """Bytes of text that each id stands for, by id; special tokens stand for none."""
        special = {self.added[text] for text in self.specials}
        return [0 if i in special else len(self.id_to_bytes[i]) for i in range(len(self))]

    def add_tokens(self, texts: list[str]) -> int:
        """Recognise these in any text from now on, appending what is no token yet; returns how many were not added
        before. A model has to follow: `model.set_vocabulary(len(tok))`."""
        before = len(self.added)
        for text in texts:
            if text and text not in self.added:
                spelled = all(char in CHAR_TO_BYTE for char in text)
                known = self.vocab.get(bytes(CHAR_TO_BYTE[char] for char in text)) if spelled else None
                self.added[text] = len(self) if known is None else known  # HF too gives "cat" the id it has
                self._index()
        return len(self.added) - before

    # Files

    def to_dict(self) -> dict:
        """The tokenizer.json of HF tokenizers."""

        def spelled(token: bytes) -> str:
            return "".join(BYTE_TO_CHAR[byte] for byte in token)

        as_first = {text: i for text, i in self.added.items() if text in self.specials}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
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
                for text, i in self.added.items()
            ],
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "post_processor": None,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": as_first | {spelled(token): i for token, i in self.vocab.items()},
                "merges": [[spelled(self.id_to_bytes[i]) for i in pair] for pair in self.merge_list],
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
            "chat_template": JINJA_TEMPLATE,
        }
        write_json(directory / "tokenizer_config.json", config | roles)

    @classmethod
    def load(cls, directory: str | Path) -> "Tokenizer":
        """Read the tokenizer.json of a directory that `save`, or HF tokenizers with the same settings, wrote."""
        path = Path(directory) / "tokenizer.json"
        if not path.exists():
            raise UserError(f"no tokenizer.json in {directory}; python train_tokenizer.py --out {directory} writes one")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is no JSON: {error}") from None
        _refuse_what_is_not_implemented(data, path)
        model, added = data["model"], sorted(data["added_tokens"], key=lambda token: token["id"])
        specials = {token["content"] for token in added if token["special"]}
        spelled = {token: i for token, i in model["vocab"].items() if token not in specials}
        try:
            vocab = {bytes(CHAR_TO_BYTE[char] for char in token): i for token, i in spelled.items()}
        except KeyError as error:
            raise UserError(f"{path}: only byte-level BPE is read; a token has the character {error}") from None
        tok = cls.__new__(cls)
        tok.added = {token["content"]: token["id"] for token in added}
        tok.specials = specials
        tok.vocab = dict(sorted(vocab.items(), key=lambda item: item[1]))
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        tok.merge_list = [(model["vocab"][left], model["vocab"][right]) for left, right in pairs]
        tok._index()
        return tok
