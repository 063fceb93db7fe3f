"""Whatever tokenizer.json and tokenizer_config.json hold: one clear error, or a tokenizer."""

import json
import random
from pathlib import Path

import pytest

from nanophi.cli import UserError
from nanophi.tokenizer.bpe import train_bpe
from nanophi.tokenizer.tokenizer import LARGEST_ID, Tokenizer
from tests.conftest import TEXTS

NAMES = ("tokenizer.json", "tokenizer_config.json")
LEVELS = (
    {"split": "qwen2"},
    {"level": "char"},
    {"level": "char", "byte_fallback": True},
)
ODD = [
    *(None, 5, -1, 1.5, True, 10**30, 2**31 - 1, "", "x", "\ud83d", "abc"),
    *([], {}, [None], [[]], [["a"]], ["a b c"], {"a": None}, {"Regex": []}),
]
TEXT = "感冒了 don't <工具>[EOS]"


def content(directory: Path) -> dict:
    return {name: json.loads((directory / name).read_text(encoding="utf-8")) for name in NAMES}


def places(value) -> list:
    """Each (container, key) in nested JSON."""
    keys = value if isinstance(value, dict) else range(len(value) if isinstance(value, list) else 0)
    found = []
    for key in keys:
        found.append((value, key))
        found += places(value[key])
    return found


def mutate(data: dict, chance: random.Random) -> None:
    """Delete, replace, double or rename one random entry."""
    everywhere = places(data)
    few = [place for place in everywhere if len(place[0]) < 50]  # not the vocabulary, nor merges
    container, key = chance.choice(few if chance.random() < 0.7 else everywhere)
    how = chance.randrange(5)
    if how == 0:
        del container[key]
    elif how == 1 and isinstance(container, list):
        container.insert(key, container[key])
    elif how == 1:
        container[chance.choice(["", "x", "\ud83d", "<0x00>"])] = container[key]
    else:
        container[key] = chance.choice(ODD)


def damaged(data: dict, chance: random.Random) -> bytes:
    """The JSON of data; one in ten is cut, or has one bit flipped."""
    raw = bytearray(json.dumps(data).encode())
    how = chance.random()
    if how < 0.05:
        return bytes(raw[: chance.randrange(len(raw))])
    if how < 0.1:
        raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
    return bytes(raw)


def use(directory: Path) -> None:
    """Load a tokenizer, encode, decode, save."""
    tok = Tokenizer.load(directory)
    ids = tok.encode(TEXT, specials=True)
    tok.decode(ids)
    tok.byte_lengths()
    tok.save(directory / "again")
    assert Tokenizer.load(directory / "again").encode(TEXT, specials=True) == ids


@pytest.mark.parametrize("options", LEVELS, ids=str)
def test_random_damage_is_one_clear_error_or_a_tokenizer(options, tmp_path):
    """A split whose pattern was "abc" or null was a TypeError, as were many more."""
    tok = train_bpe(TEXTS[:3], 400, **options)
    tok.add_tokens(["<工具>"])
    tok.save(tmp_path)
    original = {name: (tmp_path / name).read_text(encoding="utf-8") for name in NAMES}
    chance = random.Random(0)
    messages = []
    for _ in range(100):
        data = {name: json.loads(text) for name, text in original.items()}
        mutate(data[chance.choice([NAMES[0], *NAMES])], chance)
        for name in NAMES:
            (tmp_path / name).write_bytes(damaged(data[name], chance))
        try:
            use(tmp_path)
        except UserError as error:
            messages.append(str(error))
    assert 5 < len(messages) < 95
    assert [text for text in messages if str(tmp_path) not in text] == []
    assert max(len(text.replace(str(tmp_path), "")) for text in messages) < 300


def save_changed(directory: Path, change) -> None:
    """Save a tokenizer whose tokenizer.json `change` has changed."""
    data = train_bpe(TEXTS, 400, level="char").to_dict()
    change(data)
    (directory / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")


@pytest.mark.parametrize("token_id", [LARGEST_ID + 1, 2**31 - 1, 10**4000])
def test_a_huge_id_is_refused(token_id, tmp_path):
    """The id 2**31 - 1 was read, and a table with an entry for each id took 16 GB."""
    save_changed(tmp_path, lambda data: data["added_tokens"][0].update(id=token_id))
    with pytest.raises(UserError, match=r"added_tokens is no list .* id from 0 to 16,777,215"):
        Tokenizer.load(tmp_path)
    save_changed(tmp_path, lambda data: data["model"]["vocab"].update({"的的": token_id}))
    with pytest.raises(UserError, match=r"model\.vocab is no object of ids from 0 to 16,777,215"):
        Tokenizer.load(tmp_path)


def test_tokens_that_share_an_id_or_a_text_are_refused(tmp_path):
    """Of two added tokens with one id, one was decoded as the other."""

    def add(text, token_id):
        entry = {"content": text, "id": token_id, "special": True, "normalized": False}
        return lambda data: data["added_tokens"].append(entry)

    for change in (add("<甲>", 1), add("<甲>", 10), add("[EOS]", 1)):
        save_changed(tmp_path, change)
        with pytest.raises(UserError, match="stands twice in added_tokens, or another token has"):
            Tokenizer.load(tmp_path)


def test_half_of_a_surrogate_pair_in_a_token_names_the_file(tmp_path):
    save_changed(tmp_path, lambda data: data["model"]["vocab"].update({"\ud83d": 5000}))
    with pytest.raises(UserError, match=r"tokenizer\.json: half of a surrogate pair"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"\xff", b"[" * 100_000, b'{"chat_template": 5}', b'{"chat_template": [5]}']
)
def test_a_damaged_config_is_named(raw, tok, tmp_path):
    """Its chat template was passed over without a word, so that the default took its place."""
    tok.save(tmp_path)
    (tmp_path / NAMES[1]).write_bytes(raw)
    with pytest.raises(UserError, match=r"tokenizer_config\.json"):
        Tokenizer.load(tmp_path)


def test_several_templates_with_names_are_kept(tok, tmp_path):
    """transformers may save a list of templates. None of them is known here."""
    tok.save(tmp_path)
    named = [{"name": "default", "template": "{{ 1 }}"}]
    (tmp_path / NAMES[1]).write_text(json.dumps({"chat_template": named}), encoding="utf-8")
    loaded = Tokenizer.load(tmp_path)
    assert loaded.template == "unknown"
    loaded.save(tmp_path)
    assert content(tmp_path)[NAMES[1]]["chat_template"] == named
