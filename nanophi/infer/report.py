"""The figures of evaluate.py as two files: evaluation.json for programs, evaluation.md to read.

    python -m nanophi.infer.evaluate --model out/dpo --data held-out.jsonl --report out/dpo

`python -m nanophi.model.card` puts them into the card of a model.
"""

from pathlib import Path
from typing import Any

from nanophi.files import together, write_json, write_text

JSON_NAME, MARKDOWN_NAME = "evaluation.json", "evaluation.md"
SHOWN_ANSWERS = 5


def write_report(directory: str | Path, results: dict[str, Any]) -> None:
    """results: what `evaluate.main` returns"""
    directory = Path(directory)
    with together(directory):
        write_json(directory / JSON_NAME, results)
        write_text(directory / MARKDOWN_NAME, markdown(results))


def markdown(results: dict[str, Any]) -> str:
    """The sections of all that was evaluated."""
    sections = ["# Evaluation"]
    if "files" in results:
        sections.append(of_texts(results))
    if "subjects" in results:
        sections.append(of_choices(results))
    if "answers" in results:
        sections.append(of_answers(results["answers"], results["samples"]))
    return "\n\n".join(sections) + "\n"


def table(head: list[str], rows: list[list[Any]]) -> str:
    r"""A table of Markdown.

    >>> print(table(["a", "b"], [[1, "x|y"]]))
    | a | b |
    |---|---|
    | 1 | x\|y |
    """
    cells = [[str(c).replace("|", "\\|").replace("\n", "⏎") for c in row] for row in (head, *rows)]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def of_texts(results: dict[str, Any]) -> str:
    rows = [
        [
            row["file"],
            f"{row['bits_per_byte']:.3f}",
            f"{row['bits_per_character']:.3f}",
            f"{row['tokens']:,}",
            f"{row['bytes']:,}",
        ]
        for row in results["files"]
    ]
    head = ["text", "bits per byte", "bits per character", "tokens", "bytes"]
    return (
        "## Bits per byte\n\nA model that knows nothing needs 8; the fewer, the better it predicts "
        f"the text.\n\n{table(head, rows)}\n\nAll together: {results['bits_per_byte']:.3f}."
    )


def of_choices(results: dict[str, Any]) -> str:
    rows = [
        [row["subject"], row["questions"], row["right"], f"{row['right'] / row['questions']:.0%}"]
        for row in results["subjects"]
        if row["questions"]
    ]
    share, error = results["accuracy"], results["standard_error"]
    beyond = (share - 0.25) / error if error else 0.0
    verdict = "more than" if beyond > 2 else "not more than"
    return (
        f"## Multiple choice\n\n{share:.1%} of {results['questions']:,} questions right, standard "
        f"error {error:.1%}. Chance is 25 %, so this is {verdict} guessing tells.\n\n"
        f"{table(['subject', 'questions', 'right', 'share'], rows)}"
    )


def of_answers(figures: dict[str, float], samples: list[dict]) -> str:
    length = f"{figures['characters']:.0f} characters, {figures['tokens']:.0f} tokens"
    rows = [
        ["questions", f"{figures['answers']:,}"],
        ["end by themselves", f"{figures['stopped']:.0%}"],
        ["median length", length],
        ["repetition", f"{figures['repetition']:.3f}"],
        ["distinct-1, distinct-2", f"{figures['distinct_1']:.3f}, {figures['distinct_2']:.3f}"],
        ["same as another question's", f"{figures['same']:.0%}"],
    ]
    shown = [[row["question"], row["answer"]] for row in samples[:SHOWN_ANSWERS]]
    return (
        "## Answers\n\nGreedy. Nobody has judged whether they are right.\n\n"
        f"{table(['', ''], rows)}\n\nThe first ones, as they are:\n\n"
        f"{table(['question', 'answer'], shown)}"
    )
