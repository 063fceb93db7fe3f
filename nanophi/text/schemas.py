"""The schemas of rows: which keys hold a text, a question, an answer. One table knows them all.

    name of the schema         an example row
    text                       {"text": "春天来了。"}
    title/summary/sections     {"title": "茶", "summary": "一种饮料。",
                                "sections": [{"title": "种类", "content": "绿茶。"}]}    (Baike)
    prompt/chosen/rejected     {"prompt": "你好", "chosen": "你好！", "rejected": "嗯。"}
    messages                   {"messages": [{"role": "user", "content": "你好"},
                                             {"role": "assistant", "content": "你好！"}]}
    conversations              {"conversations": [{"from": "human", "value": "你好"},
                                                  {"from": "gpt", "value": "你好！"}]} (ShareGPT)
    instruction/input/output   {"instruction": "改写", "input": "天冷。", "output": "天气寒冷。"}
    prompt/response            {"prompt": "你好", "response": "你好！"}

All commands ask the table `SCHEMAS`: for reading, cleaning, deduplication, statistics, tokenizing
and training. So one more row of the table makes one more schema work in all of them:

    >>> SCHEMAS["ask/tell"] = Schema(asked=("ask",), answers=("tell",))
    >>> messages_of({"ask": "１加１？", "tell": "２。"})
    [{'role': 'user', 'content': '１加１？'}, {'role': 'assistant', 'content': '２。'}]
    >>> del SCHEMAS["ask/tell"]

Add it at the top of your script, outside of `if __name__ == "__main__"`, so that worker processes
have it too.

Read in this order: `Schema` and `SCHEMAS`; `row_checker`, which every row passes when it is read;
then what a row holds: `texts_of`, `messages_of`, `preference_of`. Nothing here reads or writes
files: formats.py does, and `corpus.read_rows` joins the two.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nanophi.cli import UserError
from nanophi.files import utf8

# ---- 1. the table


@dataclass(frozen=True)
class Schema:
    """Which keys of a row hold what. A schema is one of four kinds:

    document             a text. Any of these keys makes a row a document. When it is read, "text"
                         takes the place of these keys
    asked and answers    one question and its answer
    asked and compared   one question and two answers, the better one first, for dpo.py. A row with
                         any of the compared keys must have all keys of the schema
    turns                a conversation: the key of a list of turns, each by one speaker

    Where several keys make one question, one answer or one document, newlines join their texts.
    Keys are tuples: `answers=("output",)` has a comma.
    """

    document: tuple[str, ...] = ()
    # makes the text of a document; returns None where the row is no document after all. Without it
    # the strings under `document` are joined
    text_from: Callable[[dict], str | None] | None = None
    asked: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()  # keys of `asked` that a row may lack
    answers: tuple[str, ...] = ()
    compared: tuple[str, ...] = ()  # chosen, rejected
    turns: str = ""
    speaker: str = "role"  # the key of a turn that says who speaks
    content: str = "content"  # the key of a turn that holds the text

    def __post_init__(self) -> None:
        kinds = [self.document, self.answers, self.compared, self.turns]
        assert sum(map(bool, kinds)) == 1, "a schema has document, answers, compared or turns"
        assert bool(self.asked) == bool(self.answers or self.compared), "answers need a question"
        for keys in (self.document, self.asked, self.optional, self.answers, self.compared):
            assert isinstance(keys, tuple), f"keys are a tuple, ({keys!r},), not {keys!r}"

    @property
    def required(self) -> tuple[str, ...]:
        """The keys that a row of questions and answers must have, or a conversation.

        >>> SCHEMAS["instruction/input/output"].required
        ('instruction', 'output')
        """
        if self.turns:
            return (self.turns,)
        questions = tuple(key for key in self.asked if key not in self.optional)
        return questions + self.answers + self.compared

    def has_all_keys(self, row: dict) -> bool:
        """Whether the row has all keys that are required."""
        return all(key in row for key in self.required)


def baike_text(row: dict) -> str | None:
    """Title, summary and sections of an entry of Baike, an encyclopedia, as one text.

    None for a row with "content", such as a news article with a summary: its text is there, and
    `--field content` says so.

    >>> baike_text({"title": "茶", "sections": [{"title": "种类", "content": "绿茶。"}]})
    '茶\\n种类\\n绿茶。'
    """
    if "content" in row:
        return None
    sections = row.get("sections") or []
    if not isinstance(sections, list) or not all(isinstance(section, dict) for section in sections):
        raise UserError("'sections' should be a list of objects with title and content")
    parts = [row.get("title"), row.get("summary")]
    for section in sections:
        parts += [section.get("title"), section.get("content")]
    if not all(isinstance(part, str | None) for part in parts):
        raise UserError("title, summary and the parts of sections should be strings")
    return "\n".join(part for part in parts if part)


# A row with the keys of several schemas is a document first, then a preference pair, then a
# conversation: the first of this table. Both schemas of a single answer take an "input".
SCHEMAS: dict[str, Schema] = {
    "text": Schema(document=("text",)),
    "title/summary/sections": Schema(document=("summary", "sections"), text_from=baike_text),
    "prompt/chosen/rejected": Schema(asked=("prompt",), compared=("chosen", "rejected")),
    "messages": Schema(turns="messages"),
    "conversations": Schema(turns="conversations", speaker="from", content="value"),
    "instruction/input/output": Schema(
        asked=("instruction", "input"), optional=("input",), answers=("output",)
    ),
    "prompt/response": Schema(
        asked=("prompt", "input"), optional=("input",), answers=("response",)
    ),
}
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names of the speakers -> ours


def asked_keys() -> tuple[str, ...]:
    """The keys of all schemas that hold questions, which people type without a final full stop.

    >>> asked_keys()
    ('prompt', 'instruction', 'input')
    """
    return tuple(dict.fromkeys(key for schema in SCHEMAS.values() for key in schema.asked))


def learned_keys() -> tuple[str, ...]:
    """The keys of all schemas that hold what is learned, documents and answers.

    >>> learned_keys()
    ('text', 'chosen', 'rejected', 'output', 'response')
    """
    keys = ["text"]  # a document has its text here, whatever its schema, once it has been read
    for schema in SCHEMAS.values():
        keys += [*schema.compared, *schema.answers]
    return tuple(dict.fromkeys(keys))


def turns_keys() -> tuple[str, ...]:
    """The keys of all schemas that hold a list of turns.

    >>> turns_keys()
    ('messages', 'conversations')
    """
    return tuple(schema.turns for schema in SCHEMAS.values() if schema.turns)


def turn_keys(turn: dict) -> tuple[str, str]:
    """The keys of one turn that hold the speaker and the text. Each list of turns may have turns of
    every schema: some publish ShareGPT's "conversations" with role and content. In a table, each
    turn may have the keys of all schemas, some of them null.

    >>> turn_keys({"from": "human", "value": "你好", "role": None, "content": None})
    ('from', 'value')
    """
    for schema in SCHEMAS.values():
        keys = (schema.speaker, schema.content)
        if schema.turns and all(turn.get(key) is not None for key in keys):
            return keys
    raise UserError(f"a turn should have role and content, not {', '.join(turn) or 'nothing'}")


# ---- 2. reading: a row's known keys hold what they should


def row_checker(field: str | None = None) -> Callable[[Any], dict]:
    """A function that checks a row and returns it with a document's text under "text". A UserError
    says what is wrong with the row.

    field: the key that holds the text, whatever the schemas say

    The checker asks the table once, not for each row, because each row of a corpus passes here.

    >>> check = row_checker()
    >>> check({"title": "茶", "summary": "一种饮料。", "sections": None})
    {'title': '茶', 'text': '茶\\n一种饮料。'}
    """
    strings = tuple(dict.fromkeys(asked_keys() + learned_keys()))
    lists = turns_keys()
    known = frozenset(strings + lists)
    begins = set(lists)  # keys with which conversations and preference pairs begin
    for schema in SCHEMAS.values():
        begins.update(key for key in schema.asked if key not in schema.optional)

    def check(row: Any) -> dict:
        if not isinstance(row, dict):
            raise UserError(f"a row is an object like {{'text': ...}}, not {str(row)[:40]!r}")
        present = {key: value for key, value in row.items() if value is not None}
        if field is not None:
            present = _with_text_of_field(present, field)
        elif known.isdisjoint(present):
            present = _with_text_of_document(present)
        if present.get("text") == "" and not begins.isdisjoint(present):
            del present["text"]  # an empty column of a table that holds conversations
        for key in strings:
            if key in present:
                _check_string(key, present[key])
        for key in lists:
            if key in present:
                _check_turns(key, present[key])
        return present

    return check


def _with_text_of_field(row: dict, field: str) -> dict:
    """The row with the value of the key `field` under "text" instead.

    >>> _with_text_of_field({"body": "正文", "id": 1}, "body")
    {'id': 1, 'text': '正文'}
    """
    if row.get(field) is None:
        keys = ", ".join(map(str, row)) or "nothing"
        raise UserError(f"has no {field!r}, only {keys}; --field names the text")
    rest = {key: value for key, value in row.items() if key != field}
    return rest | {"text": row[field]}


def _with_text_of_document(row: dict) -> dict:
    """The row with "text" instead of the keys of the first schema of documents that it is of; a row
    of none as it is.

    >>> _with_text_of_document({"title": "茶", "summary": "一种饮料。"})
    {'title': '茶', 'text': '茶\\n一种饮料。'}
    """
    for schema in SCHEMAS.values():
        if any(key in row for key in schema.document):
            text = _document_text(row, schema)
            if text is not None:
                rest = {key: value for key, value in row.items() if key not in schema.document}
                return rest | {"text": text}
    return row


def _document_text(row: dict, schema: Schema) -> str | None:
    """The text of a row of a schema of documents; None where it is no document after all."""
    if schema.text_from is not None:
        return schema.text_from(row)
    parts = [key for key in schema.document if key in row]
    for key in parts:
        _check_string(key, row[key])
    return "\n".join(row[key] for key in parts)


def _check_string(key: str, value: Any) -> None:
    if not isinstance(value, str):
        raise UserError(f"{key!r} should be a string, not {str(value)[:40]!r}")
    utf8(value)


def _check_turns(key: str, turns: Any) -> None:
    if not isinstance(turns, list) or not all(_is_turn(turn) for turn in turns):
        raise UserError(f"{key!r} should be a list of objects with role and content, as strings")
    for turn in turns:
        _, content = turn_keys(turn)
        utf8(turn[content])


def _is_turn(turn: Any) -> bool:
    """Whether this is an object with a speaker and a text, both strings."""
    if not isinstance(turn, dict):
        return False
    try:
        speaker, content = turn_keys(turn)
    except UserError:
        return False
    return isinstance(turn[speaker], str) and isinstance(turn[content], str)


# ---- 3. what a row holds. The rows have been checked


def texts_of(row: dict) -> list[str]:
    """The texts of a row of any schema: one of a document, three of a preference pair, one for each
    message of a conversation.

    >>> texts_of({"prompt": "你好", "chosen": "你好！", "rejected": "嗯。"})
    ['你好', '你好！', '嗯。']
    """
    if "text" in row:
        return [row["text"]]
    if is_pair(row):
        return list(preference_of(row))
    return [message["content"] for message in messages_of(row)]


def is_pair(row: dict) -> bool:
    """Whether a row is a preference pair, complete or not."""
    return any(key in row for schema in _preference_schemas() for key in schema.compared)


def text_of(row: dict) -> str:
    """The text of a row of any schema; newlines join those of a conversation or a pair."""
    return "\n".join(texts_of(row))


def with_texts(row: dict) -> dict:
    """The row, if `texts_of` knows its schema; otherwise a UserError."""
    texts_of(row)
    return row


def messages_of(row: dict) -> list[dict]:
    """The messages of a conversation of any schema: [{"role", "content"}, ...].

    >>> messages_of({"conversations": [{"from": "human", "value": "你好"}]})
    [{'role': 'user', 'content': '你好'}]
    >>> messages_of({"instruction": "改写", "input": "天冷。", "output": "天气寒冷。"})
    [{'role': 'user', 'content': '改写\\n天冷。'}, {'role': 'assistant', 'content': '天气寒冷。'}]
    """
    for schema in SCHEMAS.values():
        if schema.turns and schema.turns in row:
            return [_message(turn) for turn in row[schema.turns]]
        if schema.answers and schema.has_all_keys(row):
            answer = "\n".join(row[key] for key in schema.answers)
            return [
                {"role": "user", "content": _question(row, schema)},
                {"role": "assistant", "content": answer},
            ]
    raise UserError(
        f"a row with the keys {', '.join(row) or 'none'} is no conversation and no text; "
        f"expected {_known_conversations()}; or {_known_documents()}"
    )


def preference_of(row: dict) -> tuple[str, str, str]:
    """(prompt, chosen answer, rejected answer) of a preference pair."""
    schemas = _preference_schemas()
    # If no schema is complete, the message speaks of the first one of which the row has a key.
    complete = [schema for schema in schemas if schema.has_all_keys(row)]
    begun = [schema for schema in schemas if any(key in row for key in schema.compared)]
    schema = [*complete, *begun, *schemas][0]
    missing = [key for key in schema.required if key not in row]
    if missing:
        raise UserError(
            f"a preference pair needs {', '.join(missing)} too; "
            f"this row has {', '.join(row) or 'no keys'}"
        )
    chosen, rejected = schema.compared
    return _question(row, schema), row[chosen], row[rejected]


def _message(turn: dict) -> dict:
    speaker, content = turn_keys(turn)
    role = ROLES.get(turn[speaker], turn[speaker])
    return {"role": role, "content": turn[content]}


def _question(row: dict, schema: Schema) -> str:
    """The texts of the question, without optional ones that are empty."""
    keys = [key for key in schema.asked if key not in schema.optional or row.get(key)]
    return "\n".join(row[key] for key in keys)


def _preference_schemas() -> list[Schema]:
    return [schema for schema in SCHEMAS.values() if schema.compared]


def _known_conversations() -> str:
    """The keys of conversations, for messages.

    >>> _known_conversations()
    'messages, conversations, instruction and output, prompt and response'
    """
    schemas = [schema for schema in SCHEMAS.values() if schema.turns or schema.answers]
    return ", ".join(" and ".join(schema.required) for schema in schemas)


def _known_documents() -> str:
    """The names of the schemas of documents, for messages."""
    return ", ".join(name for name, schema in SCHEMAS.items() if schema.document)
