"""Messages -> (ids, loss mask), by the chat template of the tokenizer. Training and chat use it.

>>> from nanophi.tokenizer.levels import ByteLevel
>>> tok = Tokenizer(ByteLevel(), ByteLevel().alphabet([]), [])
>>> turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
>>> ids, mask = encode_chat(turns, tok)
>>> tok.decode(ids)
'##提问:\\na\\n##回答:\\nb[EOS]'
>>> tok.decode([i for i, is_learned in zip(ids, mask, strict=True) if is_learned])
'b[EOS]'
"""

from typing import Any

from nanophi.cli import UserError
from nanophi.tokenizer.template import DEFAULT, Segment, check, template_named
from nanophi.tokenizer.tokenizer import Tokenizer


def segments(
    messages: list[dict], template: str = DEFAULT, unknown_jinja: Any = None
) -> list[Segment]:
    """[{"role": "user" | "assistant" | "system", "content": str}, ...] -> segments of text.

    Raises a UserError if a message lacks role or content, or if roles do not take turns.
    unknown_jinja: what a tokenizer has in place of a known template, to name it
    """
    check(messages)
    return template_named(template, unknown_jinja).segments(messages)


def encode_chat(
    messages: list[dict], tok: Tokenizer, bos: bool = False
) -> tuple[list[int], list[bool]]:
    """Messages -> (ids, mask), equally long. mask is True on each answer and its end.

    bos: put [BOS] first.
    """
    if not isinstance(tok, Tokenizer):
        raise UserError(f"tok is of type {type(tok).__name__}, expected a Tokenizer")
    ids = [tok.bos_id] if bos else []
    mask = [False] if bos else []
    for segment in segments(messages, tok.template, tok.unknown_jinja):
        new = [tok.special_id(segment.text)] if segment.special else tok.encode(segment.text)
        ids += new
        mask += [segment.learned] * len(new)
    return ids, mask


def chat_prompt(messages: str | list[dict], tok: Tokenizer, bos: bool = False) -> list[int]:
    """The ids from which the model goes on with its answer. A plain string is one question.

    A training sample of the same conversation begins with the same ids.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    check(messages)
    if messages[-1]["role"] != "user":
        raise UserError("the last message must be the user's: it is what the model answers")
    return encode_chat(messages, tok, bos)[0]
