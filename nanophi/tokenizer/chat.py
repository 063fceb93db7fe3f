"""Messages -> (ids, loss mask), by the template of the tokenizer. Training, chat and tests all go
through here.
"""

from nanophi.cli import UserError
from nanophi.tokenizer.template import TEMPLATES, Segment, check
from nanophi.tokenizer.tokenizer import Tokenizer


def segments(messages: list[dict], template: str = "wenda") -> list[Segment]:
    """[{"role": "user" | "assistant" | "system", "content": str}, ...] -> its segments. A UserError
    where roles do not take turns, or a message lacks one.
    """
    check(messages)
    return TEMPLATES[template].segments(messages)


def encode_chat(
    messages: list[dict], tok: Tokenizer, bos: bool = False
) -> tuple[list[int], list[bool]]:
    """Messages -> (ids, mask), equally long. mask is True where the loss counts: on each answer and
    its end.
    """
    ids = [tok.bos_id] if bos else []
    mask = [False] if bos else []
    for segment in segments(messages, tok.template):
        new = [tok.special_id(segment.text)] if segment.special else tok.encode(segment.text)
        ids += new
        mask += [segment.learned] * len(new)
    return ids, mask


def chat_prompt(messages: str | list[dict], tok: Tokenizer, bos: bool = False) -> list[int]:
    """The ids from which the model goes on with its answer; a plain string is one question.

    A training sample of the same conversation begins with the same ids.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if messages and messages[-1].get("role") != "user":
        raise UserError("the last message must be the user's: it is what the model answers")
    return encode_chat(messages, tok, bos)[0]
