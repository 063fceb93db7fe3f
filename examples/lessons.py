"""Lessons for a small model that shall answer from a text: first copying, then reading.

    python examples/lessons.py --out out/demo/text

    copying.jsonl    a piece of a text; the answer is the same piece, again and again
    lessons.jsonl    a sentence, a question about it, and the sentence as the answer; and, --times
                     times, the other questions of data/demo

The search finds the sentence (nanophi/infer/rag.py), and the model has to say it. What a model
of this size learns by heart it says in place of it, so no sentence comes twice: some words are
exchanged, wherever they stand.

    sentence     黄豆要先泡八个小时，磨出来的浆才细。
    exchanged    黄豆要先泡河边小时，磨出来的浆才细。
    question     黄豆要先泡什么小时？

Copying is learned suddenly, after some 250 steps in which nothing seems to happen.
"""

import random
import re
from dataclasses import dataclass
from pathlib import Path

from nanophi.cli import flag, run_command
from nanophi.infer.rag import BM25, QUESTION
from nanophi.text.corpus import read_rows, read_texts, write_rows

DATA = Path(__file__).resolve().parents[1] / "data" / "demo"
ASKING = ["什么", "什么", "谁", "哪里", "几", "多少", "多长时间", "什么时候", "什么地方", "怎样"]
HAN = re.compile("[\u4e00-\u9fff]+")
LONGEST = 96  # characters of a row of copying.jsonl


@dataclass(kw_only=True)
class Config:
    out: str = flag(help="directory of the two files")
    data: str = flag(str(DATA), help="documents, reading, sft and rephrased .jsonl")
    copying: int = flag(5900, at_least=0, help="rows of copying.jsonl")
    sentences: int = flag(4000, at_least=0, help="sentences in lessons.jsonl")
    times: int = flag(8, at_least=0, help="how often each other question stands in lessons.jsonl")
    seed: int = flag(0, at_least=0, help="of everything random")


def main(cfg: Config) -> None:
    data, out = Path(cfg.data), Path(cfg.out)
    documents = list(read_texts([data / "documents.jsonl"]))
    maker = Maker(documents, list(read_rows([data / "reading.jsonl"])), cfg.seed)
    others = list(read_rows([data / "sft.jsonl", data / "rephrased.jsonl"]))
    lessons = [maker.lesson() for _ in range(cfg.sentences)]
    write_rows(out / "copying.jsonl", [maker.copying() for _ in range(cfg.copying)])
    write_rows(out / "lessons.jsonl", lessons + others * cfg.times)


class Maker:
    """Makes rows of documents, and of the questions in data/demo/reading.jsonl."""

    def __init__(self, documents: list[str], rows: list[dict], seed: int):
        self.dice = random.Random(seed)
        self.sentences = [s for text in documents for s in sentences_of(text) if 8 <= len(s) <= 45]
        self.asked = [pair for row in rows for pair in asked_in(row)]
        self.text = "".join(documents).replace("\n", "")
        self.characters = sorted(set("".join(HAN.findall(self.text))))

    def copying(self) -> dict:
        length = self.dice.randint(8, 36)
        start = self.dice.randrange(len(self.text) - length)
        piece = self.text[start : start + length]
        return row_of(piece, (piece * 12)[: LONGEST - length])

    def lesson(self) -> dict:
        if self.dice.random() < 0.35:
            question, sentence = self.dice.choice(self.asked)
        else:
            sentence = self.dice.choice(self.sentences)
            question = self.question_about(sentence)
        for _ in range(self.dice.randint(2, 8)):
            question, sentence = self.exchange(question, sentence)
        return row_of(QUESTION.format(background=sentence, question=question), sentence)

    def question_about(self, sentence: str) -> str:
        """The sentence or a part of it, with a word that asks in the place of a piece."""
        body = sentence[:-1]
        start = self.dice.randrange(max(1, len(body) - 2))
        end = start + self.dice.randint(1, 4)
        parts = (body[:start] + self.dice.choice(ASKING) + body[end:]).split("，")
        chosen = self.dice.choice(parts) if self.dice.random() < 0.5 else "".join(parts)
        return chosen.strip("，、：；“”（）")[:24] + "？"

    def exchange(self, question: str, sentence: str) -> tuple[str, str]:
        """Another word in the place of one of the sentence, in the question too."""
        length = self.dice.randint(1, 3)
        start = self.dice.randrange(max(1, len(sentence) - length))
        word = sentence[start : start + length]
        if not HAN.fullmatch(word) or set(word) & set("".join(ASKING)):
            return question, sentence
        other = self.word(length)
        return question.replace(word, other), sentence.replace(word, other)

    def word(self, length: int) -> str:
        """Characters that follow each other in a text, or any, so that rare ones come too."""
        while self.dice.random() < 0.5:
            start = self.dice.randrange(len(self.text) - length)
            if HAN.fullmatch(self.text[start : start + length]):
                return self.text[start : start + length]
        return "".join(self.dice.choices(self.characters, k=length))


def sentences_of(text: str) -> list[str]:
    """
    >>> sentences_of("天亮了。鸟在叫！")
    ['天亮了。', '鸟在叫！']
    """
    return [sentence.strip() for sentence in re.findall(r"[^。！？\n]+[。！？]?", text)]


def asked_in(row: dict) -> list[tuple[str, str]]:
    """The question of a row of reading.jsonl, with the sentence that has most in common with it."""
    background, question = row["instruction"].split("背景：", 1)[1].split("\n问题：")
    sentences = sentences_of(background)
    scores = BM25(sentences).scores(question)
    best = max(scores, key=lambda number: scores[number], default=None)
    return [] if best is None else [(question, sentences[best])]


def row_of(question: str, answer: str) -> dict:
    return {"instruction": question, "input": "", "output": answer}


if __name__ == "__main__":
    run_command(Config, main)
