"""What a model's answers are like, counted: no judge is asked whether they are right.

    stopped       ended by itself; otherwise cut at the longest length, or by the context
    repetition    of an answer's runs of four characters, the share that it had said before
    distinct-1    different characters, of all that the answers have together
    distinct-2    the same of pairs of neighbours
    same          answers that another question got, too

A sound model stops, repeats little (below 0.05) and says different things to different questions.
One that has learned nothing but a phrase has a low distinct-2; one that never stops has a high
repetition. distinct-n: Li et al. 2016, A Diversity-Promoting Objective Function, section 5.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean, median

from nanophi.cli import Progress
from nanophi.infer.generate import generate, stop_ids
from nanophi.model.phi import Phi
from nanophi.tokenizer.chat import chat_prompt
from nanophi.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Answer:
    question: str
    text: str
    tokens: int  # [EOS] included
    stopped: bool


def answer_all(
    model: Phi, tok: Tokenizer, questions: list[str], batch: int = 16, max_new_tokens: int = 200
) -> Iterator[Answer]:
    """Greedy answers in the order of the questions, `batch` questions at a time."""
    eos = stop_ids(model, "config")
    with Progress("answers", len(questions)) as bar:
        for first in range(0, len(questions), batch):
            asked = questions[first : first + batch]
            prompts = [chat_prompt(question, tok) for question in asked]
            all_ids = generate(model, prompts, max_new_tokens=max_new_tokens)
            for question, ids in zip(asked, all_ids, strict=True):
                # A model may have more rows than there are tokens; such an id spells nothing.
                known = [token for token in ids if token in tok.id_to_bytes]
                text = tok.decode(known, skip_special_tokens=True).strip()
                yield Answer(question, text, len(ids), ids[-1] in eos)
                bar.update()


def ngrams(text: str, size: int) -> list[str]:
    """The runs of `size` characters of a text, without white space.

    >>> ngrams("多 喝水", 2)
    ['多喝', '喝水']
    """
    text = "".join(text.split())
    return [text[i : i + size] for i in range(len(text) - size + 1)]


def repetition(text: str, size: int = 4) -> float:
    """The share of a text's n-grams that occurred in it before.

    >>> repetition("好的好的好的", size=2)  # 好的 的好 好的 的好 好的: the last three
    0.6
    """
    grams = ngrams(text, size)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(texts: list[str], size: int) -> float:
    """Different n-grams of some texts, as a share of all.

    >>> distinct(["多喝水", "多休息"], size=1)  # 多 occurs twice
    0.8333333333333334
    """
    grams = [gram for text in texts for gram in ngrams(text, size)]
    return len(set(grams)) / len(grams) if grams else 0.0


def figures_of(answers: list[Answer]) -> dict[str, float]:
    """The figures of this file's heading, and how long the answers are."""
    texts = [answer.text for answer in answers]
    times = Counter(texts)
    return {
        "answers": len(answers),
        "stopped": mean(answer.stopped for answer in answers),
        "tokens": median(answer.tokens for answer in answers),
        "characters": median(len(text) for text in texts),
        "repetition": mean(repetition(text) for text in texts),
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
        "same": mean(times[text] > 1 for text in texts),
    }
