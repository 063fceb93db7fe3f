"""Retrieval-augmented generation (RAG), offline: answer from documents.

    python generate.py --model out/sft --rag documents/ --prompt 黄河的水为什么那么黄？

    documents ─ cut_passages ─> passages ─ BM25 ─> Index            once
    question  ─ Index.search ─> the best passages                   for each question
              ─ question_with ─> a prompt with background ─ the model ─> answer

A passage is a piece of a document of at most 96 tokens of the model, cut at the largest separator
that works: paragraph, line, 。. The index is BM25 (Robertson & Zaragoza 2009) over single
characters and pairs of adjacent characters, which needs no word segmentation. Where even the best
passage has too little to do with the question, the code itself answers NOT_FOUND, because a small
model would invent an answer.
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
# The form of the demo's RAG rows. A model answers it if it was taught such rows.
QUESTION = (
    "请根据下面的背景回答问题，背景里没有答案就回答“未找到相关答案”。\n"
    "背景：{background}\n"
    "问题：{question}"
)
FOUND = 0.21  # the score, 0 to 1, from which a passage is thought to answer a question
SEPARATORS = ("\n\n", "\n", "。")

# ---- documents -> passages


@dataclass
class Passage:
    text: str
    source: str  # where it comes from: file and document


def split_by_length(
    text: str, tok: Tokenizer, size: int, separators: tuple[str, ...] = SEPARATORS
) -> list[str]:
    """Cut a text into pieces of at most `size` tokens, at the largest separator that works.

    A piece keeps its separator. Where no separator is left, the piece is halved:

    >>> from types import SimpleNamespace
    >>> tok = SimpleNamespace(encode=list)  # one token for each character
    >>> split_by_length("感冒了要多喝水。好好休息。", tok, size=6)
    ['感冒了要', '多喝水。', '好好休息。']
    """
    if len(tok.encode(text)) <= size or len(text) == 1:
        return [text]
    if separators:
        parts = re.split(f"(?<={re.escape(separators[0])})", text)
    else:
        middle = len(text) // 2
        parts = [text[:middle], text[middle:]]
    pieces = []
    for part in parts:
        if part:
            pieces += split_by_length(part, tok, size, separators[1:])
    return pieces


def cut_passages(text: str, tok: Tokenizer, size: int = 96, overlap: int = 8) -> list[str]:
    """Join neighbouring pieces of a text to passages of at most `size` tokens.

    Each passage but the first begins with the last characters of the one before, at most `overlap`
    tokens of them, so that a sentence that was cut in two can still be found:

    >>> from types import SimpleNamespace
    >>> tok = SimpleNamespace(encode=list)  # one token for each character
    >>> cut_passages("感冒了要多喝水。好好休息。", tok, size=12, overlap=3)
    ['感冒了要多喝水。', '喝水。好好休息。']
    """
    passages: list[str] = []
    current = ""
    for piece in split_by_length(text, tok, size - overlap):
        if current and len(tok.encode(current + piece)) > size:
            passages.append(current)
            current = _tail(current, tok, overlap)
        current += piece
    passages.append(current)
    return [passage.strip() for passage in passages if passage.strip()]


def _tail(text: str, tok: Tokenizer, tokens: int) -> str:
    """The last characters of a text, at most `tokens` tokens and `tokens` characters of them."""
    tail = text[-tokens:]
    while len(tok.encode(tail)) > tokens:
        tail = tail[1:]
    return tail


# ---- passages -> scores

K1 = 1.2  # how fast repetitions of a gram stop to count: the usual value
B = 0.75  # how much long texts are discounted, 0 to 1: the usual value


def grams(text: str) -> list[str]:
    """Letters, digits and Han characters, one by one and in adjacent pairs.

    >>> grams("感冒了，AI")
    ['感', '冒', '了', '感冒', '冒了', 'a', 'i', 'ai']
    """
    words = re.findall(r"\w+", text.lower())
    return [word[i : i + n] for word in words for n in (1, 2) for i in range(len(word) - n + 1)]


class BM25:
    """Scores of texts for a question: 0 nothing in common, 1 the best that any text could reach.

    A text scores for each gram g of the question, once, however often the question has it:

        weight(g) * count * (K1 + 1) / (count + K1 * (1 - B + B * length / mean length))

    count is how often the text has g, and lengths are in grams. The fraction grows with the count,
    from 0 towards K1 + 1. The sum is divided by the limit that it could reach, so that one
    threshold serves short and long questions.

    Three texts, and the question 黄河. Its grams 黄, 河 and 黄河 are each in two of the three
    texts, so each has the weight ln(1 + (3 - 2 + 0.5) / (2 + 0.5)) = ln 1.6 = 0.47:

        text           length    each gram                              score of three grams
        0  黄河的水    7         0.47 * 2.2 / (1 + 1.75) = 0.47 * 0.80    0.80 / 2.2 = 0.36
        1  黄河        3         0.47 * 2.2 / (1 + 0.92) = 0.47 * 1.14    1.14 / 2.2 = 0.52
        2  长江        3         0                                        not listed
           mean        4.33

    Both texts have the grams once; the shorter text speaks of little else.

    >>> scores = BM25(["黄河的水", "黄河", "长江"]).scores("黄河")
    >>> {text: round(scores[text], 2) for text in sorted(scores)}
    {0: 0.36, 1: 0.52}
    """

    def __init__(self, texts: Iterable[str]):
        self.postings: dict[str, list[tuple[int, int]]] = defaultdict(list)  # gram -> (text, count)
        self.lengths: list[int] = []  # of each text, in grams
        for number, text in enumerate(texts):
            counts = Counter(grams(text))
            self.lengths.append(sum(counts.values()))
            for gram, count in counts.items():
                self.postings[gram].append((number, count))
        self.mean_length = sum(self.lengths) / max(len(self.lengths), 1)

    def weight(self, gram: str) -> float:
        """Inverse document frequency: a rare gram tells more than a common one.

        A gram that no text has counts as if one text had it.
        """
        having = max(len(self.postings.get(gram, ())), 1)  # number of texts
        return math.log(1 + (len(self.lengths) - having + 0.5) / (having + 0.5))

    def scores(self, question: str) -> dict[int, float]:
        """Text number -> score, for the texts that have any gram of the question."""
        asked = set(grams(question))
        limit = sum(self.weight(gram) for gram in asked) * (K1 + 1)
        scores: dict[int, float] = defaultdict(float)
        for gram in asked:
            weight = self.weight(gram)
            for number, count in self.postings.get(gram, ()):
                discount = K1 * (1 - B + B * self.lengths[number] / self.mean_length)
                scores[number] += weight * count * (K1 + 1) / (count + discount) / limit
        return scores


class Index:
    """Passages of documents, to be searched.

    The score of a passage is the mean of its own score and its whole document's. The passage's own
    score finds the place; the document's score tells what the place is about. "它的高度是一千米。"
    stands in a document on 泰山 and in one on 华山: only the documents answer "华山有多高？".
    """

    def __init__(
        self, documents: Iterable[tuple[str, str]], tok: Tokenizer, size: int = 96, overlap: int = 8
    ):
        """documents: (source, text) each. size and overlap of passages are in tokens of `tok`."""
        self.passages: list[Passage] = []
        self.document_of: list[int] = []  # passage number -> document number
        texts = []
        for number, (source, text) in enumerate(documents):
            texts.append(text)
            for part in cut_passages(text, tok, size, overlap):
                self.passages.append(Passage(part, source))
                self.document_of.append(number)
        self.by_passage = BM25(passage.text for passage in self.passages)
        self.by_document = BM25(texts)

    def search(self, question: str, k: int = 3) -> list[tuple[float, Passage]]:
        """The k best passages, best first, with their scores (0 to 1)."""
        own = self.by_passage.scores(question)
        whole = self.by_document.scores(question)
        mean = {}
        for number, score in own.items():
            mean[number] = (score + whole[self.document_of[number]]) / 2
        best = sorted(mean, key=lambda number: (-mean[number], number))[:k]
        return [(mean[number], self.passages[number]) for number in best]


def build_index(inputs: list[str], tok: Tokenizer, size: int = 96) -> Index:
    """Read documents (files, directories or globs) and index passages of at most `size` tokens."""
    documents = []
    for path in expand(inputs):
        for number, text in enumerate(read_texts([path], "document"), start=1):
            if text.strip():
                documents.append((f"{path.name} #{number}", text))
    if not documents:
        raise UserError(f"{', '.join(inputs)}: no text to answer from")
    return Index(documents, tok, size)


# ---- passages -> prompt


def question_with(passages: list[tuple[float, Passage]], question: str) -> str:
    """The question with its background, which is what `search` gave, for the chat template."""
    background = "\n".join(passage.text for _, passage in passages)
    return QUESTION.format(background=background, question=question)
