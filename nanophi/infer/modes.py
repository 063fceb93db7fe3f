"""Ways to reply to a question: chat, from documents, two models beside each other.

Each is made with what it needs and then called with one question after the other. `say(ids) -> text` generates from a
prompt and shows the answer as it comes.
"""

import shutil
import sys
import unicodedata
from collections.abc import Callable

from nanophi.cli import UserError
from nanophi.infer.generate import generate
from nanophi.infer.rag import NOT_FOUND, Index, question_with
from nanophi.model.phi import Phi
from nanophi.text.corpus import write_rows
from nanophi.tokenizer.chat import chat_prompt
from nanophi.tokenizer.tokenizer import Tokenizer

CLOSING = "，。、；：？！）》」』”’…"  # marks that never begin a line

Say = Callable[[list[int]], str]
Reply = Callable[[str], str]  # a question in, its answer shown and returned


def chatting(say: Say, tok: Tokenizer, context: int, history: int = 0, bos: bool = False) -> Reply:
    """Remember the last `history` turns, fewer where they do not fit into `context` tokens."""
    messages: list[dict] = []

    def reply(question: str) -> str:
        nonlocal messages
        asked = [
            *(messages[-2 * history :] if history else []),
            {"role": "user", "content": question},
        ]
        while len(prompt := chat_prompt(asked, tok, bos)) >= context and asked[1:]:
            asked = asked[2:]  # the oldest turn goes
        answer = say(prompt)
        messages = [*asked, {"role": "assistant", "content": answer}]
        return answer

    return reply


def retrieving(
    say: Say, tok: Tokenizer, index: Index, chunks: int, threshold: float, bos: bool = False
) -> Reply:
    """Answer from the best chunks and name them on standard error; what no chunk speaks of is not answered."""

    def reply(question: str) -> str:
        found = index.search(question, chunks)
        score = found[0][0] if found else 0.0
        if score < threshold:
            print(NOT_FOUND)
            print(
                f"(best score {score:.2f} is below the threshold {threshold:.2f})", file=sys.stderr
            )
            return NOT_FOUND
        answer = say(chat_prompt(question_with(found, question), tok, bos))
        for score, chunk in found:
            print(
                f"[{score:.2f}, threshold {threshold:.2f}] {chunk.source}: {chunk.text[:40]!r}",
                file=sys.stderr,
            )
        return answer

    return reply


def evaluating_aloud(
    evaluate: Callable | None, tok: Tokenizer, prompt: list[int], tokens: int = 60
) -> Callable:
    """`evaluate` for the training loop, which then also prints how the model goes on after a prompt, greedily."""

    def evaluated(model: Phi) -> dict[str, float]:
        was_training = model.training
        model.eval()
        said = tok.decode(generate(model, prompt, max_new_tokens=tokens), skip_special_tokens=True)
        model.train(was_training)
        print(f"sample: {tok.decode(prompt)}{said}".replace("\n", "⏎"))
        return evaluate(model) if evaluate is not None else {}

    return evaluated


def comparing(answers: dict[str, Callable[[str], str]]) -> Reply:
    """Put the answers of several models in columns; answers: a title and a function from question to answer each."""

    def reply(question: str) -> str:
        said = [answer(question) for answer in answers.values()]
        print(side_by_side(list(answers), said))
        return said[0]

    return reply


def converse(start: Callable[[], Reply]) -> None:
    """Ask for questions until /exit or Ctrl-D. /reset forgets what was said, /save FILE.jsonl keeps it as a row that
    sft.py reads, Ctrl-C stops an answer and not the program."""
    reply, messages = start(), []
    while True:
        try:
            question = input("提问> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        command, _, argument = question.partition(" ")
        try:
            if command == "/exit":
                return
            if command == "/reset":
                reply, messages = start(), []
            elif command == "/save":
                path = argument.strip() or "chat.jsonl"
                write_rows(path, [{"messages": messages}])
                print(f"saved {len(messages) // 2} turns to {path}")
            elif question:
                answer = reply(question)
                messages += [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": answer},
                ]
        except KeyboardInterrupt:
            print(" [stopped]")
        except (
            UserError,
            OSError,
        ) as error:  # a question too long, a file that cannot be written: the chat goes on
            print(error)


def display_width(text: str) -> int:
    """Columns a text takes in a terminal: 2 for each Chinese (wide) character, 0 for combining ones, else 1."""
    return sum(
        0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF")
        for c in text
    )


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` columns, broken between characters as Chinese is, but not before a closing mark."""
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for char in paragraph:
            if display_width(line + char) > width:
                keep = len(line) - (
                    char in CLOSING and len(line) > 1
                )  # the mark takes the last character with it
                lines.append(line[:keep])
                line = line[keep:]
            line += char
        lines.append(line)
    return lines


def side_by_side(titles: list[str], texts: list[str], width: int | None = None) -> str:
    """Texts in columns under their titles; width: of the whole (default: the terminal's)."""
    width = width or shutil.get_terminal_size((100, 24)).columns
    column = max((width - 3 * (len(texts) - 1)) // len(texts), 10)
    cells = [
        [*wrap(title, column), "-" * column, *wrap(text, column)]
        for title, text in zip(titles, texts, strict=True)
    ]
    height = max(map(len, cells))
    rows = zip(*(cell + [""] * (height - len(cell)) for cell in cells), strict=True)
    return "\n".join(
        " | ".join(line + " " * (column - display_width(line)) for line in row).rstrip()
        for row in rows
    )
