"""Chat templates: messages -> labelled segments of text. TEMPLATES has them by name.

"wenda" (问答), the default, is that of Phi2-mini-Chinese; "chatml" is what most engines know.
Segments of one turn, each between bars; what is learned stands in braces:

    wenda     |##提问:⏎你是谁？⏎##回答:⏎|{小助手。|[EOS]}|
    chatml    |<|im_start|>|user⏎你是谁？|<|im_end|>|⏎|
              |<|im_start|>|assistant⏎|{小助手。|<|im_end|>}|⏎|

Why segments: the loss mask then comes from joining them. To search the ids for "##回答:" fails,
because BPE may merge its ":" with the text that follows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nanophi.cli import SHOWN, UserError, flag, row_named
from nanophi.expect import shown


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

START, END = "<|im_start|>", "<|im_end|>"


def chatml(messages: list[dict]) -> list[Segment]:
    """ChatML, which OpenAI made and Qwen and many others took over: each message has a header.

    >>> question = {"role": "user", "content": "你是谁？"}
    >>> for segment in chatml([question]):
    ...     print(repr(segment.text), segment.special)
    '<|im_start|>' True
    'user\\n你是谁？' False
    '<|im_end|>' True
    '\\n' False
    '<|im_start|>' True
    'assistant\\n' False
    """
    segments: list[Segment] = []
    for message in messages:
        segments.append(Segment(START, special=True))
        if message["role"] == "assistant":
            segments.append(Segment("assistant\n"))
            segments.append(Segment(message["content"].strip(), learned=True))
            segments.append(Segment(END, learned=True, special=True))
        else:
            # One string, because some splits join its parts, as in `wenda`.
            segments.append(Segment(f"{message['role']}\n{message['content']}"))
            segments.append(Segment(END, special=True))
        segments.append(Segment("\n"))
    if messages[-1]["role"] == "user":
        segments += [Segment(START, special=True), Segment("assistant\n")]
    return segments


CHATML_JINJA = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' -}}"
    "{%- if message['role'] == 'assistant' -%}{{- message['content'] | trim -}}"
    "{%- else -%}{{- message['content'] -}}{%- endif -%}"
    "{{- '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{%- if messages[-1]['role'] == 'user' -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)

TEMPLATES = {
    "wenda": Template(wenda, WENDA_JINJA, former=(FORMER_WENDA_JINJA,)),
    "chatml": Template(chatml, CHATML_JINJA, stop=END, specials=(START, END)),
}
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


def template_named(name: str, jinja: Any = None) -> Template:
    """The template of a name, or a UserError that says what to do.

    jinja: what a tokenizer from elsewhere has, whose name is UNKNOWN
    """
    if name == UNKNOWN:
        raise UserError(
            f"the chat template of this tokenizer, {shown(jinja)}, is not known here: give "
            f"--template {' or '.join(TEMPLATES)}, if the model was taught in it, or teach it one "
            "with sft.py --template"
        )
    return row_named(TEMPLATES, name, "template")


def template_flag() -> Any:
    """The flag --template of the commands that turn messages into text."""
    return flag(
        None,
        choices=TEMPLATES,
        help="how turns become text (default: the checkpoint's own; wenda is the original's)",
    )
