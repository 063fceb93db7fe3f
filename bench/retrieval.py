"""How often retrieval puts the passage that holds the answer first, and what score tells that there is none.

    python bench/retrieval.py --docs docs.jsonl --qa qa.jsonl --tokenizer out/tokenizer

Rows: {"id", "text"} and {"doc_id", "question"}. A question is asked again with its own passage left out of account; the
threshold is the score that best tells the two cases apart.
"""

from dataclasses import dataclass

from nanophi.cli import Progress, flag, run_command
from nanophi.infer.rag import Index
from nanophi.text.corpus import read_rows
from nanophi.tokenizer.tokenizer import Tokenizer


@dataclass(kw_only=True)
class Config:
    docs: str = flag(help="passages: id, text")
    qa: str = flag(help="questions: doc_id, question")
    tokenizer: str = flag(help="whose tokens measure the chunks")


def main(cfg: Config) -> dict:
    passages = [(row["id"], row["text"]) for row in read_rows([cfg.docs])]
    index = Index(passages, Tokenizer.load(cfg.tokenizer))
    questions = list(read_rows([cfg.qa]))
    first, fifth, present, absent = 0, 0, [], []
    with Progress("questions", len(questions)) as bar:
        for row in questions:
            found = index.search(row["question"], 50)
            sources = list(dict.fromkeys(chunk.source for _, chunk in found))
            first += sources[:1] == [row["doc_id"]]
            fifth += row["doc_id"] in sources[:5]
            present.append(found[0][0] if found else 0.0)
            absent.append(
                next((score for score, chunk in found if chunk.source != row["doc_id"]), 0.0)
            )
            bar.update()
    n = len(questions)

    def told_apart(threshold: float) -> float:
        return (sum(s >= threshold for s in present) + sum(s < threshold for s in absent)) / (2 * n)

    best = max((i / 100 for i in range(100)), key=told_apart)
    recall = {"recall@1": first / n, "recall@5": fifth / n}
    print(f"{len(passages):,} passages, {len(index.passages):,} chunks, {n:,} questions")
    print(f"recall@1 {recall['recall@1']:.3f}  recall@5 {recall['recall@5']:.3f}")
    print(
        f"median best score {sorted(present)[n // 2]:.3f}, without the passage {sorted(absent)[n // 2]:.3f}"
    )
    print(f"threshold {best:.2f} tells the two apart in {told_apart(best):.1%} of the cases")
    return recall


if __name__ == "__main__":
    run_command(Config, main)
