"""The schemas of a row: what the people who publish Chinese data call a text, a question, an answer.

    {"text"}                                                        a document
    {"title", "summary", "sections": [{"title", "content"}]}        a document, as Baike has it
    {"instruction", "input"?, "output"}, {"prompt", "response"}     one question and its answer
    {"messages": [{"role", "content"}]}, {"conversations": [{"from": "human" | "gpt", "value"}]}
    {"prompt", "chosen", "rejected"}                                a preference pair

Nothing here reads or writes: `formats.py` does, and `corpus.read_rows` joins the two.
"""

from nanophi.cli import UserError
from nanophi.files import utf8

# The keys that hold text; what is asked, and what is learned (and so ends in punctuation).
ASKED = ("instruction", "input", "prompt")
LEARNED = ("text", "output", "response", "chosen", "rejected")
TURNS = {"messages": ("role", "content"), "conversations": ("from", "value")}
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names


def checked(row, field: str | None = None) -> dict:
    """A row whose known keys hold what they should; a null is as good as absent. Anything else is a UserError.

    field: see `as_document`."""
    if not isinstance(row, dict):
        raise UserError(f"a row is an object like {{'text': ...}}, not {str(row)[:40]!r}")
    row = as_document({key: value for key, value in row.items() if value is not None}, field)
    if row.get("text") == "" and any(key in row for key in ("instruction", "prompt", *TURNS)):
        del row["text"]  # an empty column of a table that holds conversations
    for key in (*ASKED, *LEARNED):
        if key in row and not isinstance(row[key], str):
            raise UserError(f"{key!r} should be a string, not {str(row[key])[:40]!r}")
        utf8(row.get(key, ""))
    for key in TURNS:
        if key in row:
            turns = row[key] if isinstance(row[key], list) else [None]
            for turn in turns:
                who, what = _turn_keys(turn) if isinstance(turn, dict) else (None, None)
                if who is None or not (isinstance(turn[who], str) and isinstance(turn[what], str)):
                    raise UserError(
                        f"{key!r} should be a list of objects with role and content, as strings"
                    )
                utf8(turn[what])
    return row


def _turn_keys(turn: dict) -> tuple[str, str] | tuple[None, None]:
    """How a turn names its speaker and its text: role and content, or ShareGPT's from and value."""
    return next((keys for keys in TURNS.values() if all(key in turn for key in keys)), (None, None))


def as_document(row: dict, field: str | None = None) -> dict:
    """The row with what it calls its text under "text": the key `field`, or the parts of a Baike entry."""
    if field is not None:
        if row.get(field) is None:
            raise UserError(
                f"has no {field!r}, only {', '.join(map(str, row)) or 'nothing'}; --field names the text"
            )
        return {key: value for key, value in row.items() if key != field} | {"text": row[field]}
    others = any(key in row for key in ("content", *TURNS, *ASKED, *LEARNED))
    if others or not ("sections" in row or "summary" in row):
        return row
    sections = row.get("sections") or []
    if not isinstance(sections, list) or not all(isinstance(section, dict) for section in sections):
        raise UserError("'sections' should be a list of objects with title and content")
    parts = [
        row.get("title"),
        row.get("summary"),
        *(s.get(k) for s in sections for k in ("title", "content")),
    ]
    if not all(isinstance(part, str | None) for part in parts):
        raise UserError("title, summary and the parts of sections should be strings")
    rest = {key: value for key, value in row.items() if key not in ("summary", "sections")}
    return rest | {"text": "\n".join(part for part in parts if part)}


def texts_of(row: dict) -> list[str]:
    """The texts of a row of any schema: a document's text, a pair's three, a conversation's turns."""
    if "text" in row:
        return [row["text"]]
    if "chosen" in row or "rejected" in row:
        return list(preference_of(row))
    return [message["content"] for message in messages_of(row)]


def with_texts(row: dict) -> dict:
    """The row, if it is of a schema that `texts_of` knows."""
    texts_of(row)
    return row


def text_of(row: dict) -> str:
    """The text of a row of any schema; those of a conversation or a pair are joined by newlines."""
    return "\n".join(texts_of(row))


def messages_of(row: dict) -> list[dict]:
    """A conversation in any schema people have -> [{"role", "content"}, ...].

    {"instruction", "input"?, "output"}, {"prompt", "response"}, {"messages": [{"role", "content"}]},
    {"conversations": [{"from": "human" | "gpt", "value"}]}
    """
    for key in TURNS:
        if key in row:
            named = [(turn, *_turn_keys(turn)) for turn in row[key]]
            return [
                {"role": ROLES.get(turn[who], turn[who]), "content": turn[what]}
                for turn, who, what in named
            ]
    for question, answer in (("instruction", "output"), ("prompt", "response")):
        if question in row and answer in row:
            asked = row[question] + ("\n" + row["input"] if row.get("input") else "")
            return [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": row[answer]},
            ]
    raise UserError(
        f"a row with the keys {', '.join(row) or 'none'} is no conversation and no text; expected instruction and "
        "output, prompt and response, messages, or conversations; or text"
    )


def preference_of(row: dict) -> tuple[str, str, str]:
    """{"prompt", "chosen", "rejected"} -> the three."""
    keys = ("prompt", "chosen", "rejected")
    if missing := [key for key in keys if key not in row]:
        raise UserError(
            f"a preference pair needs {', '.join(missing)} too; this row has {', '.join(row) or 'no keys'}"
        )
    return tuple(row[key] for key in keys)
