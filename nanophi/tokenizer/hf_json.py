"""tokenizer.json and its companions: the files of HF tokenizers, in and out.

    tokenizer.json             the tokenizer, as `tokenizers` and many engines read it
    tokenizer_config.json      for transformers' AutoTokenizer: the class, the chat template, roles
    special_tokens_map.json    only the roles: {"eos_token": "[EOS]", ...}

A tokenizer.json, shortened:

    {"added_tokens": [{"id": 1, "content": "[EOS]", "special": true, ...}, ...],
     "normalizer": ..., "pre_tokenizer": ..., "post_processor": ..., "decoder": ...,    the level
     "model": {"type": "BPE", "vocab": {"a": 72, ...}, "merges": [["a", "b"], ...], ...}}

Writing is `to_dict` and `save`. Reading is `load`: `misshapen` checks that the file has this shape,
`level_of` that its settings are those of a level that exists here. Other settings would load and
give other ids, so they are refused.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanophi.cli import SHOWN, UserError
from nanophi.expect import Expected, check, check_fields, path_of, read_json, shown
from nanophi.files import finish, together, write_json
from nanophi.tokenizer.levels import ByteLevel, CharLevel, Level, PieceLevel
from nanophi.tokenizer.splits import SPLITS
from nanophi.tokenizer.template import TEMPLATES, template_of
from nanophi.tokenizer.tokenizer import LARGEST_ID, SPECIAL_TOKENS, Tokenizer

Json = dict[str, Any]  # an object of a JSON file

# ---- Writing


def to_dict(tok: Tokenizer) -> Json:
    """The content of tokenizer.json."""
    by_id = sorted(tok.added.items(), key=lambda item: item[1])
    special_ids = {text: i for text, i in tok.added.items() if text in tok.specials}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(text, i, text in tok.specials) for text, i in by_id],
        **settings_of(tok.level),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "[UNK]" if tok.level.name == "char" else None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": tok.level.byte_fallback,
            "ignore_merges": False,
            "vocab": special_ids | tok.vocab,
            "merges": [[tok.spelling[i] for i in pair] for pair in tok.merge_list],
        },
    }


def added_token(text: str, token_id: int, special: bool) -> Json:
    """An entry of "added_tokens". "normalized": the token is sought in the normalized text."""
    return {
        "id": token_id,
        "content": text,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": not special,
        "special": special,
    }


def save(tok: Tokenizer, directory: str | Path) -> None:
    """Write the three files so that AutoTokenizer of transformers 4.57 and 5 reads them."""
    directory = path_of(directory, "the directory of a tokenizer")
    roles = roles_of(tok)
    jinja = tok.unknown_jinja
    if tok.template in TEMPLATES:
        jinja = TEMPLATES[tok.template].jinja
    config = {
        # Without a class, or with GPT-2's, transformers 5 rebuilds the split and gives other ids.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "chat_template": jinja,
    }
    with together(directory):
        write_json(directory / "tokenizer.json", to_dict(tok))
        write_json(directory / "special_tokens_map.json", roles)
        write_json(directory / "tokenizer_config.json", config | roles)


def roles_of(tok: Tokenizer) -> dict[str, str]:
    """{"pad_token": "[PAD]", "eos_token": "[EOS]", ...}: what transformers uses a token for.

    Only the seven SPECIAL_TOKENS have roles, and eos_token is what ends an answer in the chat
    template. Other special tokens, such as <|im_start|>, have none.
    """
    roles = {}
    for name in SPECIAL_TOKENS:
        if name in tok.specials:
            roles[f"{name.strip('[]').lower()}_token"] = name
    if tok.template in TEMPLATES:
        stop = TEMPLATES[tok.template].stop
        if stop in tok.specials:
            roles["eos_token"] = stop
    return roles


# ---- The settings of each level


def settings_of(level: Level) -> Json:
    """The entries normalizer, pre_tokenizer, post_processor and decoder of a level."""
    if isinstance(level, ByteLevel):
        return byte_settings(level)
    if isinstance(level, PieceLevel):
        return piece_settings()
    return char_settings(level)


def byte_settings(level: ByteLevel) -> Json:
    """ByteLevel has GPT-2's split built in; another split stands before it as a pattern."""
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    pre_tokenizer: Json = byte_level
    if level.split != "gpt2":
        split = {
            "type": "Split",
            "pattern": {"Regex": SPLITS[level.split].pattern},
            "behavior": "Isolated",
            "invert": False,
        }
        without_split = byte_level | {"use_regex": False}
        pre_tokenizer = {"type": "Sequence", "pretokenizers": [split, without_split]}
    return {
        "normalizer": {"type": "NFC"} if level.nfc else None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": byte_level,
    }


def char_settings(level: CharLevel) -> Json:
    """Punctuation and digits alone, "▁" for a space."""
    punctuation = {"type": "Punctuation", "behavior": "Isolated"}
    digits = {"type": "Digits", "individual_digits": True}
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": True}
    decoder: Json = space
    if level.byte_fallback:
        decoder = {"type": "Sequence", "decoders": [space, {"type": "ByteFallback"}]}
    return {
        "normalizer": {"type": "NFKC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [punctuation, digits, space]},
        "post_processor": None,
        "decoder": decoder,
    }


def piece_settings() -> Json:
    """No split; "▁" for a space."""
    to_mark = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    to_space = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    decoders = [to_space, {"type": "ByteFallback"}, {"type": "Fuse"}]
    return {
        "normalizer": to_mark,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
    }


# ---- Reading


def load(directory: str | Path) -> Tokenizer:
    """Read the tokenizer.json that `save`, or HF tokenizers with the same settings, wrote.

    Raises a UserError that says what is wrong with the file.
    """
    directory = path_of(directory, "the directory of a tokenizer")
    finish(directory)
    path = directory / "tokenizer.json"
    data = read(path)
    level = level_of(data, path)
    vocab = data["model"]["vocab"]
    merges = merges_of(data)
    added = added_of(data, path)
    specials = {token["content"] for token in data["added_tokens"] if token["special"]} - {""}
    ordinary = ordinary_tokens(vocab, merges, specials, level)
    if missing := set(level.alphabet([])) - ordinary.keys():
        raise UserError(f"{path}: {len(missing)} of the 256 bytes are missing from the vocabulary")
    try:
        pairs = [(vocab[left], vocab[right]) for left, right in merges]
        tok = Tokenizer.of_parts(level, added, specials, ordinary, pairs)
    except KeyError as error:
        at = shown(error.args[0])
        raise UserError(f"{path}: tokens and merges do not fit together, at {at}") from None
    except UserError as error:  # half of a surrogate pair in a token
        raise UserError(f"{path}: {error}") from None
    jinja = jinja_of(directory / "tokenizer_config.json")
    tok.template = template_of(jinja)
    if tok.template not in TEMPLATES:
        tok.unknown_jinja = jinja
    return tok


def read(path: Path) -> Json:
    """The content of a tokenizer.json, whose shape has been checked."""
    if not path.exists():
        raise UserError(
            f"no tokenizer.json in {path.parent}; "
            f"python train_tokenizer.py --out {path.parent} writes one"
        )
    data = read_json(path)
    fault = misshapen(data)
    if fault is not None:
        raise UserError(f"{path} is no tokenizer.json: {fault}")
    data.setdefault("added_tokens", [])
    return data


def merges_of(data: Json) -> list[tuple[str, str]]:
    """The merges as pairs of spellings. Older files have each as one string, "a b"."""
    merges = []
    for merge in data["model"]["merges"]:
        left, right = pair_of(merge)
        merges.append((left, right))
    return merges


def pair_of(merge: Any) -> Any:
    """An entry of "merges" as a list of spellings: "a b" and ["a", "b"] give ["a", "b"]."""
    return merge.split(" ") if isinstance(merge, str) else merge


def added_of(data: Json, path: Path) -> dict[str, int]:
    """{text: id} of the added tokens, by id."""
    vocab = data["model"]["vocab"]
    text_of_id = {i: text for text, i in vocab.items()}
    added: dict[str, int] = {}
    for token in sorted(data["added_tokens"], key=lambda token: token["id"]):
        text = token["content"]
        if not text:
            continue
        if vocab.get(text, token["id"]) != token["id"]:
            raise UserError(
                f"{path}: {shown(text)} has one id in the vocabulary and another in added_tokens"
            )
        if text in added or text_of_id.setdefault(token["id"], text) != text:
            raise UserError(
                f"{path}: {shown(text)} stands twice in added_tokens, "
                f"or another token has its id {token['id']}, too"
            )
        added[text] = token["id"]
    return added


def ordinary_tokens(
    vocab: dict[str, int], merges: list[tuple[str, str]], specials: set[str], level: Level
) -> dict[str, int]:
    """The vocabulary without the special tokens, which HF lists in it, too.

    A special token that merging can make stays: a character, or the product of a merge.
    """
    made = {left + right for left, right in merges}
    made.update(level.alphabet(token for token in vocab if len(token) == 1))
    return {token: i for token, i in vocab.items() if token not in specials or token in made}


def jinja_of(path: Path) -> Any:
    """The chat template of a tokenizer_config.json; None if there is no file or no template.

    It may be a list of templates with names, which is known to none of TEMPLATES.
    """
    if not path.exists():
        return None
    config = read_json(path)
    check_fields(config, {}, path)
    jinja = config.get("chat_template")
    if not is_list_of(is_named_template, jinja):
        check(jinja, Expected(str, optional=True), f"{path}: chat_template")
    return jinja


# ---- The shape of the file


def misshapen(data: Any) -> str | None:
    """What does not have the shape that the functions here rely on; None if everything has it."""
    if not isinstance(data, dict) or not isinstance(data.get("model"), dict):
        return "it is no object with a model"
    for name in ("pre_tokenizer", "normalizer", "post_processor"):
        if not isinstance(data.get(name), dict | None):
            return f"{name} is no object"
    if not is_list_of(is_object, pre_tokenizers(data)) or not pre_tokenizers(data):
        return "pretokenizers is no list of objects"
    if not is_list_of(is_added_token, data.get("added_tokens", [])):
        return (
            "added_tokens is no list of objects with content, special, "
            f"and an id from 0 to {LARGEST_ID:,}"
        )
    if data["model"].get("type") != "BPE":
        return None  # `level_of` refuses it with a better message
    return misshapen_model(data["model"])


def misshapen_model(model: Json) -> str | None:
    """The same for the entries of a BPE model."""
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not is_list_of(is_id, list(vocab.values())):
        return f"model.vocab is no object of ids from 0 to {LARGEST_ID:,}"
    if len(set(vocab.values())) < len(vocab):
        return "two tokens of model.vocab have one id"
    if not is_list_of(is_merge, model.get("merges")):
        return "model.merges is no list of pairs"
    pairs = {tuple(pair_of(merge)) for merge in model["merges"]}
    if len(pairs) < len(model["merges"]):
        return "a merge stands twice in model.merges"
    return None


def pre_tokenizers(data: Json) -> Any:
    """The list of a Sequence; otherwise a list with the one pre_tokenizer, which is {} if null."""
    pre_tokenizer = data.get("pre_tokenizer") or {}
    return pre_tokenizer.get("pretokenizers", [pre_tokenizer])


def is_list_of(is_one: Callable[[Any], bool], value: Any) -> bool:
    """Whether a value is a list whose entries all pass a check."""
    return isinstance(value, list) and all(is_one(entry) for entry in value)


def is_object(value: Any) -> bool:
    return isinstance(value, dict)


def is_id(value: Any) -> bool:
    """Whether a value can be a token's id. JSON's true and false are ints to Python."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST_ID


def is_named_template(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("name"), str)
        and isinstance(value.get("template"), str)
    )


def is_added_token(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("content"), str)
        and isinstance(value.get("special"), bool)
        and is_id(value.get("id"))
    )


def is_merge(value: Any) -> bool:
    """Whether a value is ["a", "b"] or "a b"."""
    pair = pair_of(value)
    return isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)


# ---- The settings of the file


def level_of(data: Json, path: Path) -> Level:
    """The level of a tokenizer.json; a UserError if it is none of the three."""
    level = nearest_level(data)
    fault = unlike(data, level)
    if fault is not None:
        raise UserError(f"{path}: {fault}")
    return level


def nearest_level(data: Json) -> Level:
    """The level that the most telling settings belong to. `unlike` compares the others."""
    if any(part.get("type") == "ByteLevel" for part in pre_tokenizers(data)):
        return ByteLevel(split_of(data) or "gpt2", nfc=bool(data.get("normalizer")))
    byte_fallback = bool(data["model"].get("byte_fallback"))
    if byte_fallback and not data.get("pre_tokenizer"):
        return PieceLevel()
    return CharLevel(byte_fallback)


def unlike(data: Json, level: Level) -> str | None:
    """What in a tokenizer.json is not as the level has it, and would give other ids; else None."""
    kinds = "+".join(named(part.get("type")) for part in pre_tokenizers(data)[:5])
    if not has_known_model(data["model"], level):
        return (
            f"a model {named(data['model'].get('type'))} with pre_tokenizer {kinds} is not read; "
            "byte-level BPE, and char-level BPE with [UNK], are"
        )
    if not has_known_split(data, level):
        return (
            f"this pre_tokenizer ({kinds}) splits otherwise than {', '.join(SPLITS)}, "
            "or the char level of train_tokenizer.py"
        )
    normalizer = data.get("normalizer")
    if normalizer != settings_of(level)["normalizer"]:
        return f"the normalizer {named(normalizer)} is not supported"
    post_processor = (data.get("post_processor") or {}).get("type")
    if post_processor not in (None, "ByteLevel"):  # ByteLevel's changes the offsets only
        return f"the post_processor {named(post_processor)} is not supported"
    for token in data["added_tokens"]:
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            return "lstrip, rstrip and single_word of added tokens are not supported"
    others = unsupported_settings(data, level)
    if others:
        return f"the settings {', '.join(others)} are not supported"
    return None


def named(value: Any) -> str:
    """A value of the file as messages show it: a name as it is."""
    return shown(value) if isinstance(value, list | dict) else str(value)[:SHOWN]


def has_known_model(model: Json, level: Level) -> bool:
    """Whether the model is BPE, and at char level spells the unknown character [UNK]."""
    if model.get("type") != "BPE":
        return False
    return level.name == "byte" or model.get("unk_token") == "[UNK]"


def has_known_split(data: Json, level: Level) -> bool:
    """Whether the pre_tokenizer splits as the level does."""
    if level.name == "byte":
        return split_of(data) is not None
    return (data.get("pre_tokenizer") or None) == settings_of(level)["pre_tokenizer"]


def split_of(data: Json) -> str | None:
    """The name of a byte-level pre_tokenizer's split in SPLITS; None if it is none of them.

    GPT-2's is [ByteLevel] with use_regex, another is [Split, ByteLevel] without use_regex.
    """
    parts = pre_tokenizers(data)
    byte_level = parts[-1]
    if byte_level.get("type") != "ByteLevel" or byte_level.get("add_prefix_space"):
        return None
    use_regex = byte_level.get("use_regex", True)
    if len(parts) == 1:
        return "gpt2" if use_regex else None
    split = parts[0]
    if len(parts) > 2 or use_regex or split.get("type") != "Split":
        return None
    if split.get("behavior") != "Isolated" or split.get("invert"):
        return None
    for name, known in SPLITS.items():
        if split.get("pattern") == {"Regex": known.pattern}:
            return name
    return None


def unsupported_settings(data: Json, level: Level) -> list[str]:
    """The names of other settings that would change ids."""
    model = data["model"]
    names = [name for name in ("truncation", "padding") if data.get(name)]
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            names.append(name)
    if level.name == "char" and model.get("fuse_unk") and not level.byte_fallback:
        names.append("fuse_unk")
    if model.get("ignore_merges"):
        names.append("ignore_merges")
    if level.name == "char" and not all(map(is_sought_as_here, data["added_tokens"])):
        names.append("normalized")
    return names


def is_sought_as_here(token: Json) -> bool:
    """Whether an added token is sought in the raw text if it is special, else in the normalized."""
    return token.get("normalized", True) != token.get("special")
