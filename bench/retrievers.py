"""How often the document with the answer comes first, or among the first three: ours and others.

    python bench/retrievers.py --docs docs.jsonl --qa qa.jsonl --tokenizer out/tokenizer

Rows: {"id", "text"} and {"doc_id", "question"}, as for bench/retrieval.py. Texts are whole
documents or passages of 96 tokens; a document stands where its best passage stands.

    BM25            nanophi's, over characters and pairs
    Index           nanophi's, the mean of a passage's score and its document's
    GramEmbeddings  examples/langchain_nanophi.py, hashed characters and pairs (langchain-core)
    rank_bm25       BM25 over the words of jieba (rank-bm25, jieba)
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from table import print_head, print_row

from nanophi.cli import Progress, flag, run_command
from nanophi.infer.rag import BM25, Index
from nanophi.text.corpus import read_rows
from nanophi.tokenizer.tokenizer import Tokenizer

Scores = Callable[[str], np.ndarray]  # a question -> the score of each text
LOOKED_AT = 50  # best texts; the three best documents are among them


@dataclass(kw_only=True)
class Config:
    docs: str = flag(help="documents: id, text")
    qa: str = flag(help="questions: doc_id, question")
    tokenizer: str = flag(help="whose tokens measure the passages")


def main(cfg: Config) -> None:
    rows = list(read_rows([cfg.docs]))
    asked = [(row["question"], row["doc_id"]) for row in read_rows([cfg.qa])]
    texts = [row["text"] for row in rows]
    index = Index([(row["id"], row["text"]) for row in rows], Tokenizer.load(cfg.tokenizer))
    passages = [passage.text for passage in index.passages]
    print(f"{len(texts):,} documents, {len(passages):,} passages, {len(asked):,} questions\n")

    print_head("scores", "of", "recall@1", "recall@3", "ms a question")
    for name, (prepare, needs) in WAYS.items():
        missing = [package for package in needs if find_spec(package) is None]
        if missing:
            print(f"{name} is skipped: {', '.join(missing)} not installed", file=sys.stderr)
            continue
        ids = [row["id"] for row in rows]
        measure(name, "documents", best_of(prepare(texts), ids), asked)
        ids = [passage.source for passage in index.passages]
        measure(name, "passages", best_of(prepare(passages), ids), asked)

    def search(question: str) -> list[str]:
        return [passage.source for _, passage in index.search(question, LOOKED_AT)]

    measure("Index", "both", search, asked)


def best_of(scores: Scores, ids: Sequence[str]) -> Callable[[str], list[str]]:
    """A question -> the ids of the texts that have anything to do with it, best first."""

    def search(question: str) -> list[str]:
        found = scores(question)
        order = np.argsort(-found, kind="stable")[:LOOKED_AT]
        return [ids[number] for number in order if found[number] > 0]

    return search


def measure(
    name: str, of: str, search: Callable[[str], list[str]], asked: list[tuple[str, str]]
) -> None:
    """Print a row: how often the right document is among the best."""
    first = third = 0
    seconds = 0.0
    with Progress(f"{name}, {of}", len(asked)) as bar:
        for question, right in asked:
            began = time.perf_counter()
            found = list(dict.fromkeys(search(question)))
            seconds += time.perf_counter() - began
            first += found[:1] == [right]
            third += right in found[:3]
            bar.update()
    n = len(asked)
    print_row(name, of, f"{first / n:.3f}", f"{third / n:.3f}", f"{1000 * seconds / n:.1f}")


# ---- ways to score texts


def characters(texts: list[str]) -> Scores:
    index = BM25(texts)

    def scores(question: str) -> np.ndarray:
        found = np.zeros(len(texts))
        for number, score in index.scores(question).items():
            found[number] = score
        return found

    return scores


def vectors(texts: list[str]) -> Scores:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from examples.langchain_nanophi import GramEmbeddings

    embeddings = GramEmbeddings()
    matrix = np.array([embeddings.embed_query(text) for text in texts], dtype=np.float32)
    return lambda question: matrix @ np.array(embeddings.embed_query(question), dtype=np.float32)


def words(texts: list[str]) -> Scores:
    import jieba
    from rank_bm25 import BM25Okapi

    jieba.setLogLevel("WARNING")
    index = BM25Okapi([jieba.lcut(text) for text in texts])
    return lambda question: index.get_scores(jieba.lcut(question))


WAYS = {  # name -> (texts -> Scores, packages that it needs)
    "BM25": (characters, ()),
    "GramEmbeddings": (vectors, ("langchain_core",)),
    "rank_bm25": (words, ("rank_bm25", "jieba")),
}


if __name__ == "__main__":
    run_command(Config, main)
