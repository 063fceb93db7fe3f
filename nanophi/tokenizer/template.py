"""Chat templates: messages -> labelled segments of text. TEMPLATES has them by name.

The default, "wenda" (问答), is that of Phi2-mini-Chinese. One turn is two segments:

    ##提问:\\n{question}\\n##回答:\\n     encoded as one string, not learned
    {answer}[EOS]                       learned

Why segments: the loss mask then comes from joining them. To search the ids for "##回答:" fails,
because BPE may merge its ":" with the text that follows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nanophi.cli import SHOWN, UserError, row_named


@dataclass(frozen=True)
class Segment:
    """A piece of a conversation that is encoded by itself."""

    text: str
    learned: bool = False  # whether the loss counts it: answers and their end
    special: bool = False  # whether the text names one special token, such as [EOS]


@dataclass(frozen=True)
class Template:
    """How a conversation becomes text, for training (`segments`) and for other engines (`jinja`).

    segments(messages): all segments of a checked list of {"role", "content"}; where the last
    message is the user's, they end with what invites the model to answer. stop: the special token
    that ends an answer. specials: special tokens that a tokenizer needs beside its own. jinja: the
    same for transformers' `apply_chat_template`. former: what `jinja` once was; a tokenizer that
    was saved with it has this template, too.
    """

    segments: Callable[[list[dict]], list[Segment]]
    jinja: str
    stop: str = "[EOS]"
    specials: tuple[str, ...] = ()
    former: tuple[str, ...] = ()


PROMPT = "##提问:\n{question}\n##回答:\n"


def wenda(messages: list[dict]) -> list[Segment]:
    """The template of Phi2-mini-Chinese. The system messages before a question join it, one a line.

    >>> first = {"role": "user", "content": "你是谁？"}
    >>> answer = {"role": "assistant", "content": "小助手。"}
    >>> brief = {"role": "system", "content": "简短回答。"}
    >>> second = {"role": "user", "content": "会做饭吗？"}
    >>> for segment in wenda([first, answer, brief, second]):
    ...     print(repr(segment.text), segment.learned)
    '##提问:\\n你是谁？\\n##回答:\\n' False
    '小助手。' True
    '[EOS]' True
    '##提问:\\n简短回答。\\n会做饭吗？\\n##回答:\\n' False
    """
    segments: list[Segment] = []
    before = ""
    for message in messages:
        if message["role"] == "system":
            before += message["content"] + "\n"
        elif message["role"] == "user":
            # One string, because some splits join its parts: "？\n" is one word there.
            segments.append(Segment(PROMPT.format(question=before + message["content"])))
            before = ""
        else:
            segments.append(Segment(message["content"].strip(), learned=True))
            segments.append(Segment("[EOS]", learned=True, special=True))
    return segments


WENDA_JINJA = (
    "{%- set ns = namespace(before='') -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}"
    "{%- set ns.before = ns.before + message['content'] + '\n' -%}"
    "{%- elif message['role'] == 'user' -%}"
    "{{- '##提问:\n' + ns.before + message['content'] + '\n##回答:\n' -}}{%- set ns.before = '' -%}"
    "{%- else -%}{{- message['content'] | trim + '[EOS]' -}}{%- endif -%}"
    "{%- endfor -%}"
)

# Of several system messages it kept the last one only.
FORMER_WENDA_JINJA = WENDA_JINJA.replace("ns.before = ns.before + ", "ns.before = ")

TEMPLATES = {"wenda": Template(wenda, WENDA_JINJA, former=(FORMER_WENDA_JINJA,))}
DEFAULT = "wenda"
EXAMPLE = '{"role": "user", "content": "你好"}'


def check(messages: list[dict]) -> None:
    """Raise a UserError if user and assistant do not take turns, user first. System messages may
    stand between, where a question follows.
    """
    if not isinstance(messages, list | tuple):
        raise UserError(
            f"messages are of type {type(messages).__name__}, expected a list of them; "
            f"one is {EXAMPLE}"
        )
    turns = 0
    waiting = 0  # the number of a system message that waits for its question
    for number, message in enumerate(messages, start=1):
        check_message(message, number)
        role = message["role"]
        if role == "system":
            waiting = number
            continue
        expected = "user" if turns % 2 == 0 else "assistant"
        if role != expected:
            raise UserError(
                f"message {number} is from {role[:SHOWN]!r}; "
                "user and assistant take turns, user first"
            )
        if role == "user":
            waiting = 0
        turns += 1
    if turns == 0:
        raise UserError("there is no question in the messages")
    if waiting:
        raise UserError(
            f"message {waiting} is from 'system' and no question follows, so it would be lost; "
            "put it before a question"
        )


def check_message(message: Any, number: int) -> None:
    """Raise a UserError if a message has no role or no content."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise UserError(f"message {number} has no role; one is {EXAMPLE}")
    if not isinstance(message.get("content"), str):
        raise UserError(
            f"message {number} (from {message['role'][:SHOWN]!r}) has no content, which is a string"
        )


UNKNOWN = "unknown"  # the template of a tokenizer from elsewhere, which TEMPLATES lacks


def template_of(jinja: Any) -> str:
    """The name of a template that is given as Jinja; without any it is the default."""
    if jinja is None:
        return DEFAULT
    names = [
        name
        for name, template in TEMPLATES.items()
        if jinja == template.jinja or jinja in template.former
    ]
    return names[0] if names else UNKNOWN


def template_named(name: str) -> Template:
    """The template of a name, or a UserError that says what to do."""
    if name == UNKNOWN:
        raise UserError(
            f"this tokenizer has a chat template that is not known here; there are "
            f"{', '.join(TEMPLATES)}: fine-tune the model with sft.py --template NAME"
        )
    return row_named(TEMPLATES, name, "template")
