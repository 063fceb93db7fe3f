"""Chat templates: messages -> labelled segments of text. TEMPLATES has them by name.

The default, "wenda" (问答), is that of Phi2-mini-Chinese. One turn is two segments:

    ##提问:\\n{question}\\n##回答:\\n     encoded as one string, not learned
    {answer}[EOS]                       learned

Why segments: the loss mask then comes from joining them. To search the ids for "##回答:" fails,
because BPE may merge its ":" with the text that follows.
"""

from collections.abc import Callable
from dataclasses import dataclass

from nanophi.cli import UserError, row_named


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
    same for transformers' `apply_chat_template`.
    """

    segments: Callable[[list[dict]], list[Segment]]
    jinja: str
    stop: str = "[EOS]"
    specials: tuple[str, ...] = ()


PROMPT = "##提问:\n{question}\n##回答:\n"


def wenda(messages: list[dict]) -> list[Segment]:
    """The template of Phi2-mini-Chinese. The last system message before a question joins it.

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
            before = message["content"] + "\n"
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
    "{%- if message['role'] == 'system' -%}{%- set ns.before = message['content'] + '\n' -%}"
    "{%- elif message['role'] == 'user' -%}"
    "{{- '##提问:\n' + ns.before + message['content'] + '\n##回答:\n' -}}{%- set ns.before = '' -%}"
    "{%- else -%}{{- message['content'] | trim + '[EOS]' -}}{%- endif -%}"
    "{%- endfor -%}"
)

TEMPLATES = {"wenda": Template(wenda, WENDA_JINJA)}
DEFAULT = "wenda"


def check(messages: list[dict]) -> None:
    """Raise a UserError if user and assistant do not take turns, user first. System messages may
    stand between.
    """
    turns = 0
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(
                f'message {number} has no role; one is {{"role": "user", "content": "你好"}}'
            )
        if not isinstance(message.get("content"), str):
            raise UserError(
                f"message {number} (from {message['role']!r}) has no content, which is a string"
            )
        role = message["role"]
        if role == "system":
            continue
        expected = "user" if turns % 2 == 0 else "assistant"
        if role != expected:
            raise UserError(
                f"message {number} is from {role!r}; user and assistant take turns, user first"
            )
        turns += 1
    if turns == 0:
        raise UserError("there is no question in the messages")


UNKNOWN = "unknown"  # the template of a tokenizer from elsewhere, which TEMPLATES lacks


def template_of(jinja: str | None) -> str:
    """The name of a template that is given as Jinja; without any it is the default."""
    if jinja is None:
        return DEFAULT
    names = [name for name, template in TEMPLATES.items() if template.jinja == jinja]
    return names[0] if names else UNKNOWN


def template_named(name: str) -> Template:
    """The template of a name, or a UserError that says what to do."""
    if name == UNKNOWN:
        raise UserError(
            f"this tokenizer has a chat template that is not known here; there are "
            f"{', '.join(TEMPLATES)}: fine-tune the model with sft.py --template NAME"
        )
    return row_named(TEMPLATES, name, "template")
