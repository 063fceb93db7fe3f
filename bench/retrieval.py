"""How often retrieval puts the passage that holds the answer first, and from which score on there
is an answer at all.

    python bench/retrieval.py --docs docs.jsonl --qa qa.jsonl --tokenizer out/tokenizer

Rows: {"id", "text"} and {"doc_id", "question"}. Each question also counts as one without an answer:
the hits of its own document are then left out. The threshold is the score that best tells the two
cases apart.
"""

from dataclasses import dataclass

from nanophi.cli import Progress, flag, run_command
from nanophi.infer.rag import Index, Passage
from nanophi.text.corpus import read_rows
from nanophi.tokenizer.tokenizer import Tokenizer


@dataclass(kw_only=True)
class Config:
    docs: str = flag(help="passages: id, text")
    qa: str = flag(help="questions: doc_id, question")
    tokenizer: str = flag(help="whose tokens measure the chunks")


def main(cfg: Config) -> dict:
    documents = [(row["id"], row["text"]) for row in read_rows([cfg.docs])]
    questions = list(read_rows([cfg.qa]))
    index = Index(documents, Tokenizer.load(cfg.tokenizer))

    first = 0  # questions whose document is the best one
    fifth = 0  # questions whose document is among the best five
    present = []  # best score of each question
    absent = []  # the same without the question's own document
    with Progress("questions", len(questions)) as bar:
        for row in questions:
            hits = index.search(row["question"], 50)
            sources = list(dict.fromkeys(passage.source for _, passage in hits))
            first += sources[:1] == [row["doc_id"]]
            fifth += row["doc_id"] in sources[:5]
            present.append(best_score(hits))
            absent.append(best_score([hit for hit in hits if hit[1].source != row["doc_id"]]))
            bar.update()

    n = len(questions)
    recall = {"recall@1": first / n, "recall@5": fifth / n}
    threshold = max((i / 100 for i in range(100)), key=lambda t: share_right(present, absent, t))
    right = share_right(present, absent, threshold)
    print(f"{len(documents):,} passages, {len(index.passages):,} chunks, {n:,} questions")
    print(f"recall@1 {recall['recall@1']:.3f}  recall@5 {recall['recall@5']:.3f}")
    print(
        f"median best score {sorted(present)[n // 2]:.3f}, "
        f"without the passage {sorted(absent)[n // 2]:.3f}"
    )
    print(f"threshold {threshold:.2f} tells the two apart in {right:.1%} of the cases")
    return recall


def best_score(hits: list[tuple[float, Passage]]) -> float:
    """The score of the first hit, 0 where there is none."""
    return hits[0][0] if hits else 0.0


def share_right(present: list[float], absent: list[float], threshold: float) -> float:
    """How many of the cases a threshold tells right: an answer is there from this score on.

    >>> share_right(present=[0.9, 0.4], absent=[0.1, 0.2], threshold=0.5)
    0.75
    """
    right = sum(score >= threshold for score in present) + sum(
        score < threshold for score in absent
    )
    return right / (len(present) + len(absent))


if __name__ == "__main__":
    run_command(Config, main)
