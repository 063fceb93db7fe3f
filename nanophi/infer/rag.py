"""Retrieval-augmented generation, offline: documents -> chunks -> BM25 index -> a prompt with background -> an answer.

    python generate.py --model out/sft --rag documents/ --prompt 黄河的水为什么那么黄？

Chunks are cut by the model's own token length at the largest separator that works (paragraph, line, 。). The index is
BM25 (Robertson & Zaragoza 2009) over characters and pairs of adjacent characters, which needs no word segmentation.
Where even the best chunk has too little to do with the question, the code itself says so: a small model would invent.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from nanophi.cli import UserError
from nanophi.text.corpus import expand, read_texts
from nanophi.tokenizer.tokenizer import Tokenizer

NOT_FOUND = "未找到相关答案。"
# The form of the demo's RAG rows; a model answers it if it was taught such rows.
QUESTION = "请根据下面的背景回答问题，背景里没有答案就回答“未找到相关答案”。\n背景：{background}\n问题：{question}"
SEPARATORS = ("\n\n", "\n", "。")
K1, B = (
    1.2,
    0.75,
)  # saturation of repeated grams, and how much long chunks are discounted: the usual values


@dataclass
class Chunk:
    text: str
    source: str  # where it comes from: file and document


def split_by_length(
    text: str, tok: Tokenizer, size: int, separators: tuple[str, ...] = SEPARATORS
) -> list[str]:
    """Cut a text into pieces of at most `size` tokens, at the first separator that makes them small enough."""
    if len(tok.encode(text)) <= size or len(text) == 1:
        return [text]
    if separators:
        pieces = re.split(f"(?<={re.escape(separators[0])})", text)  # each keeps its separator
    else:  # none helps: halve it
        pieces = [text[: len(text) // 2], text[len(text) // 2 :]]
    return [
        part
        for piece in pieces
        if piece
        for part in split_by_length(piece, tok, size, separators[1:])
    ]


def chunk(text: str, tok: Tokenizer, size: int = 96, overlap: int = 8) -> list[str]:
    """Join neighbouring pieces to chunks of at most `size` tokens; each but the first begins with the last characters
    of the one before, `overlap` tokens at most, so that a sentence cut in two can still be found."""
    chunks: list[str] = []
    held = ""
    for piece in split_by_length(text, tok, size - overlap):
        if held and len(tok.encode(held + piece)) > size:
            chunks.append(held)
            tail = held[-overlap:]
            while len(tok.encode(tail)) > overlap:
                tail = tail[1:]
            held = tail
        held += piece
    return [c.strip() for c in [*chunks, held] if c.strip()]


def grams(text: str) -> list[str]:
    """Letters, digits and Han, one by one and in adjacent pairs: 感冒了 -> 感 冒 了 感冒 冒了."""
    words = re.findall(r"\w+", text.lower())
    return [word[i : i + n] for word in words for n in (1, 2) for i in range(len(word) - n + 1)]


class BM25:
    """Scores of texts for a question, as shares of the best score the question could reach: 0 to 1, so that one
    threshold serves short and long questions."""

    def __init__(self, texts: Iterable[str]):
        self.postings: dict[str, list[tuple[int, int]]] = defaultdict(
            list
        )  # gram -> (text, how often)
        self.lengths: list[int] = []
        for number, text in enumerate(texts):
            counts = Counter(grams(text))
            self.lengths.append(sum(counts.values()))
            for gram, count in counts.items():
                self.postings[gram].append((number, count))
        self.mean_length = sum(self.lengths) / max(len(self.lengths), 1)

    def weight(self, gram: str) -> float:
        """Inverse document frequency: rare grams say more; one that no text has counts as if one had it."""
        found = max(len(self.postings.get(gram, ())), 1)
        return math.log(1 + (len(self.lengths) - found + 0.5) / (found + 0.5))

    def scores(self, question: str) -> dict[int, float]:
        """Text number -> score, for the texts that share anything with the question."""
        asked = set(grams(question))
        best = sum(self.weight(gram) for gram in asked) * (K1 + 1)
        scores: dict[int, float] = defaultdict(float)
        for gram in asked:
            weight = self.weight(gram)
            for number, count in self.postings.get(gram, ()):
                spread = K1 * (1 - B + B * self.lengths[number] / self.mean_length)
                scores[number] += weight * count * (K1 + 1) / (count + spread) / best
        return scores


class Index:
    """Chunks of documents. A chunk is as good as the mean of its own score and its whole document's: the chunk finds
    the place, the document knows what the place is about."""

    def __init__(
        self, documents: Iterable[tuple[str, str]], tok: Tokenizer, size: int = 96, overlap: int = 8
    ):
        """documents: (source, text) each."""
        self.chunks: list[Chunk] = []
        self.document_of: list[int] = []  # of each chunk
        texts = []
        for number, (source, text) in enumerate(documents):
            texts.append(text)
            parts = chunk(text, tok, size, overlap)
            self.chunks += [Chunk(part, source) for part in parts]
            self.document_of += [number] * len(parts)
        self.by_chunk, self.by_document = BM25(c.text for c in self.chunks), BM25(texts)

    def search(self, question: str, k: int = 3) -> list[tuple[float, Chunk]]:
        """The k best chunks, best first, with their scores (0 to 1)."""
        chunks, documents = self.by_chunk.scores(question), self.by_document.scores(question)
        mean = {
            number: (own + documents[self.document_of[number]]) / 2
            for number, own in chunks.items()
        }
        best = sorted(mean, key=lambda number: (-mean[number], number))[:k]
        return [(mean[number], self.chunks[number]) for number in best]


def build_index(inputs: list[str], tok: Tokenizer) -> Index:
    """Read documents (files, directories or globs) and index them."""
    documents = [
        (f"{path.name} #{number}", text)
        for path in expand(inputs)
        for number, text in enumerate(read_texts([path], "document"), start=1)
        if text.strip()
    ]
    if not documents:
        raise UserError(f"{', '.join(inputs)}: no text to answer from")
    return Index(documents, tok)


def question_with(found: list[tuple[float, Chunk]], question: str) -> str:
    """The question that carries its background, for the chat template."""
    return QUESTION.format(background="\n".join(item.text for _, item in found), question=question)
