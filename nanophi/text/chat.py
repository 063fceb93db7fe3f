"""THE chat template: messages -> labelled segments -> (ids, loss mask). Training, chat, server and tests all use it.

One turn is two segments:

    ##提问:\\n{question}\\n##回答:\\n     encoded as one string, not learned
    {answer}[EOS]                       learned

The mask comes from joining segments, never from searching ids: BPE may merge ":" with what follows it. The prompt is
one string because some splits join its parts ("？\\n" is one pre-token there). The next turn follows [EOS] directly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanophi.cli import UserError

if TYPE_CHECKING:  # the tokenizer saves the template, so it imports this file
    from nanophi.text.tokenizer import Tokenizer

PROMPT = "##提问:\n{question}\n##回答:\n"

# The same for `tokenizer.apply_chat_template` of transformers. A system message is put before the next question.
JINJA_TEMPLATE = (
    "{%- set ns = namespace(before='') -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{%- set ns.before = message['content'] + '\n' -%}"
    "{%- elif message['role'] == 'user' -%}"
    "{{- '##提问:\n' + ns.before + message['content'] + '\n##回答:\n' -}}{%- set ns.before = '' -%}"
    "{%- else -%}{{- message['content'] | trim + '[EOS]' -}}{%- endif -%}"
    "{%- endfor -%}"
)


def segments(messages: list[dict]) -> list[tuple[str, bool]]:
    """[{"role": "user" | "assistant" | "system", "content": str}, ...] -> [(text, learned), ...].

    Questions and answers alternate; a system message joins the question after it. White space around an answer goes.
    """
    parts, before = [], ""
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "system":
            before = content + "\n"
            continue
        answering = len(parts) % 2 == 1
        if role != ("assistant" if answering else "user"):
            raise UserError(f"message {len(parts) + 1} is from {role!r}; user and assistant take turns, user first")
        parts.append((content.strip(), True) if answering else (PROMPT.format(question=before + content), False))
        before = ""
    if not parts:
        raise UserError("there is no question in the messages")
    return parts


def encode_chat(messages: list[dict], tok: Tokenizer, bos: bool = False) -> tuple[list[int], list[bool]]:
    """Messages -> (ids, mask), equally long; mask is True on each answer and its [EOS]."""
    ids, mask = ([tok.bos_id], [False]) if bos else ([], [])
    for text, learned in segments(messages):
        new = tok.encode(text) + ([tok.eos_id] if learned else [])
        ids += new
        mask += [learned] * len(new)
    return ids, mask


def chat_prompt(messages: str | list[dict], tok: Tokenizer, bos: bool = False) -> list[int]:
    """The ids from which the model goes on with its answer; a plain string is one question.

    They are the ids a training sample of the same conversation starts with.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if messages and messages[-1]["role"] != "user":
        raise UserError("the last message must be the user's: it is what the model answers")
    return encode_chat(messages, tok, bos)[0]
