"""Ways to reply to a question: chat, answers from documents, two models beside each other.

Each way is a function that is made once, with all it needs, and then called with one question after
the other:

    reply = chatting(say, tok, context=512, history=2)
    reply("感冒了要怎么办？")        shows the answer, and returns it

`say(ids) -> text` generates from the ids of a prompt and shows the answer as it comes; generate.py
makes it. `converse` asks for questions at the terminal and gives them to a reply. prefer.py shows
two answers and asks which is better.
"""

import os
import sys
from collections.abc import Callable

from nanophi.claims import refuse
from nanophi.cli import UserError
from nanophi.columns import side_by_side
from nanophi.expect import Expected, check
from nanophi.infer.rag import NOT_FOUND, Index, question_with
from nanophi.text.corpus import write_rows
from nanophi.text.outputs import rows_output
from nanophi.tokenizer.chat import chat_prompt
from nanophi.tokenizer.tokenizer import Tokenizer

Say = Callable[[list[int]], str]
Reply = Callable[[str], str]  # a question -> its answer, which has been shown

# ---- the ways


def chatting(say: Say, tok: Tokenizer, context: int, history: int = 0, bos: bool = False) -> Reply:
    """Reply with the last `history` turns in view; fewer where they do not fit into the context.

    context: tokens; bos: whether prompts begin with [BOS]
    """
    remembered: list[dict] = []  # messages, two for each turn

    def reply(question: str) -> str:
        nonlocal remembered
        earlier = remembered[-2 * history :] if history else []
        messages = [*earlier, {"role": "user", "content": question}]
        prompt = chat_prompt(messages, tok, bos)
        while len(prompt) >= context and len(messages) > 1:
            messages = messages[2:]  # without the oldest turn
            prompt = chat_prompt(messages, tok, bos)
        answer = say(prompt)
        remembered = [*messages, {"role": "assistant", "content": answer}]
        return answer

    return reply


def retrieving(
    say: Say, tok: Tokenizer, index: Index, passages: int, threshold: float, bos: bool = False
) -> Reply:
    """Answer from the best `passages` of the documents, and name them on standard error.

    Where even the best score is below the threshold the answer is NOT_FOUND, without the model: a
    small model would invent an answer. So it is where no passage has anything in common with the
    question.
    """
    check(passages, Expected(int, at_least=1), "passages")
    check(threshold, Expected(float, at_least=0), "threshold")

    def reply(question: str) -> str:
        ranked = index.search(question, passages)
        best = ranked[0][0] if ranked else 0.0
        if not ranked or best < threshold:
            print(NOT_FOUND)
            print(
                f"(best score {best:.2f} is below the threshold {threshold:.2f})", file=sys.stderr
            )
            return NOT_FOUND
        answer = say(chat_prompt(question_with(ranked, question), tok, bos))
        for score, passage in ranked:
            begin = passage.text[:40]
            print(
                f"[{score:.2f}, threshold {threshold:.2f}] {passage.source}: {begin!r}",
                file=sys.stderr,
            )
        return answer

    return reply


def comparing(models: dict[str, Callable[[str], str]]) -> Reply:
    """Put the answers of several models in columns, and return the first one's.

    models: a title -> a function from a question to its answer, which shows nothing
    """

    def reply(question: str) -> str:
        answers = [answer(question) for answer in models.values()]
        print(side_by_side(list(models), answers))
        return answers[0]

    return reply


# ---- the terminal


def converse(start: Callable[[], Reply]) -> None:
    """Ask for questions until /exit or Ctrl-D. `start` makes a reply that remembers nothing.

    /reset            forget the conversation
    /save FILE.jsonl  write the conversation as a row that sft.py reads, into a new file or one that
                      this chat has written
    Ctrl-C            stop an answer and not the program
    """
    reply = start()
    messages: list[dict] = []
    saved: set[str] = set()

    def obey(line: str) -> None:
        nonlocal reply, messages
        command, _, argument = line.partition(" ")
        if command == "/reset":
            reply = start()
            messages = []
        elif command == "/save":
            save(messages, argument.strip() or "chat.jsonl", saved)
        else:
            answer = reply(line)
            messages.append({"role": "user", "content": line})
            messages.append({"role": "assistant", "content": answer})

    each_line(obey)


def each_line(obey: Callable[[str], None]) -> None:
    """Ask for lines until /exit or Ctrl-D, and obey each one that is not empty.

    Ctrl-C stops what is done about a line and not the program.
    """
    while True:
        try:
            line = input("提问> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line.partition(" ")[0] == "/exit":
            return
        try:
            if line:
                obey(line)
        except KeyboardInterrupt:
            print(" [stopped]")
        except (ValueError, OSError) as error:
            # A question that is too long, or a file that cannot be written, does not end the chat.
            # A UserError is a ValueError, and so is what Python says of a zero byte in a file name.
            print(error)


def save(messages: list[dict], path: str, saved: set[str]) -> None:
    """Write a conversation as one row.

    saved: the files that this chat has written, which it may write again; this one is put in. Any
    other file may hold what somebody needs, such as a whole corpus, and is refused
    """
    if not messages:
        raise UserError("there is nothing to save yet")
    refuse(rows_output("/save", path))
    real = os.path.realpath(path)
    if os.path.exists(real) and real not in saved:
        raise UserError(f"/save {path}: the file is there already, name another")
    write_rows(path, [{"messages": messages}])
    saved.add(real)
    print(f"saved {len(messages) // 2} turns to {path}")
