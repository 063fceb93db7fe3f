"""What a tokenizer holds and how well it serves a text: train_tokenizer.py calls these.

    write_vocabulary(tok, "vocab.tsv")       every token, readable: id, text, bytes, kind, merge
    report(tok, texts)                       characters and bytes per token, by script
    draw_lengths(tok, "lengths.png")         how many tokens have 1, 2, 3, ... characters

Lines of vocab.tsv at byte level, where a token may end inside a character (made-up counts):

    id   text             bytes                kind   count  merge
    7    !                21                   byte
    263  <E4><BB>         e4 bb                merge  41     <E4> + <BB>
    301  我们             e6 88 91 e4 bb ac    merge  17     我 + 们
"""

import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from nanophi.files import replacing, write_text
from nanophi.tokenizer.levels import BYTE_TOKENS
from nanophi.tokenizer.tokenizer import Tokenizer, each_text

# Texts that a tokenizer should give back unchanged.
ROUND_TRIPS = {
    "tab": "a\tb",
    "line breaks": "一\n\n二",
    "spaces": "一    二",
    "emoji": "😀👨‍👩‍👧",
    "rare Han": "㐀𠮷龘",
    "full width": "ＡＢ１２，！",
    "combining": "e\u0301",
    "template": "##提问:\n问\n##回答:\n答",
}

PART = "part of a character"
SCRIPTS = ("Han", "Latin", "digits", "punctuation", "space", "mixed", PART)

LONGEST_SHOWN = 8  # Han tokens in a report
LONGEST_DRAWN = 12  # characters; longer tokens share the last bar

# ---- One token


def script_of(text: str) -> str:
    """Han, Latin, digits, punctuation (symbols too) or space; mixed if it has several.

    >>> [script_of(text) for text in ("感冒", " the", "3.", "……")]
    ['Han', 'Latin', 'mixed', 'punctuation']
    """
    scripts = {_script_of_character(char) for char in text}
    if len(scripts) > 1:
        scripts.discard("space")  # " the" is Latin
    return scripts.pop() if len(scripts) == 1 else "mixed"


def _script_of_character(char: str) -> str:
    category = unicodedata.category(char)
    if char.isspace():
        return "space"
    if category[0] == "N":
        return "digits"
    if category[0] in "PSC":
        return "punctuation"
    if "CJK" in unicodedata.name(char, ""):
        return "Han"
    if ord(char) < 0x250:
        return "Latin"
    return "mixed"


def describe(tok: Tokenizer, token_id: int) -> tuple[str, str, str]:
    """(readable text, script, kind) of a token. Bytes that are no text show as <E4><B8>.

    kind: special, added, byte, character or merge.
    """
    text = tok.piece(token_id)
    if token_id in tok.added.values():
        return text, "mixed", "special" if text in tok.specials else "added"
    kind = _kind_of(tok, tok.spelling[token_id])
    is_part = tok.id_to_bytes[token_id] != text.encode()
    return text, PART if is_part else script_of(text), kind


def _kind_of(tok: Tokenizer, spelling: str) -> str:
    """byte, character or merge, of an ordinary token."""
    if tok.level.byte_fallback and spelling in BYTE_TOKENS:
        return "byte"
    if len(spelling) > 1:
        return "merge"
    return "byte" if tok.level.name == "byte" else "character"


# ---- vocab.tsv


def write_vocabulary(tok: Tokenizer, path: str | Path) -> None:
    """Write vocab.tsv: id, text, bytes, kind, count and merge, one token a line.

    text: white space and control characters are escaped. count: how often the pair occurred in the
    training text when it was merged. merge: the two tokens that were merged.
    """
    pair_of_merged = {merged: pair for pair, (_, merged) in tok.merges.items()}
    count_of_pair = dict(zip(tok.merge_list, tok.merge_counts, strict=False))
    lines = ["id\ttext\tbytes\tkind\tcount\tmerge"]
    for token_id in sorted(tok.id_to_bytes):
        text, _, kind = describe(tok, token_id)
        raw = tok.id_to_bytes[token_id].hex(" ")
        count = ""
        merge = ""
        pair = pair_of_merged.get(token_id)
        if pair is not None:
            count = str(count_of_pair.get(pair, ""))
            merge = " + ".join(describe(tok, part)[0] for part in pair)
        lines.append("\t".join([str(token_id), _shown(text), raw, kind, count, _shown(merge)]))
    write_text(path, "\n".join(lines) + "\n")


def _shown(text: str) -> str:
    r"""A text with everything escaped that would not show: "a\n" has three printable characters."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# ---- The report


def report(tok: Tokenizer, texts: Iterable[str]) -> str:
    """Characters and bytes per token on some texts, by script; the longest tokens; the round trips.

    A table to print, here with made-up numbers:

        script                   tokens   share  characters each  bytes each
        Han                       1,204   61.3%             1.62        4.86
        ...
        all                       1,964                     1.37        3.71
    """
    used: Counter[int] = Counter()  # token id -> how often
    characters = 0
    for text in each_text(texts, "report"):
        characters += len(text)
        used.update(tok.encode(text))
    total = max(used.total(), 1)
    described = {i: describe(tok, i) for i in used}
    head = f"{'script':20} {'tokens':>10} {'share':>7} {'characters each':>16} {'bytes each':>11}"
    lines = [head]
    for script in SCRIPTS:
        line = _line_of_script(tok, script, used, described, total)
        if line is not None:
            lines.append(line)
    size = sum(times * len(tok.id_to_bytes[i]) for i, times in used.items()) / total
    lines.append(f"{'all':20} {total:10,} {'':7} {characters / total:16.2f} {size:11.2f}")

    vocabulary = [describe(tok, i)[:2] for i in _ordinary_ids(tok)]  # text and script
    single_bytes = sum(used[i] for i in used if described[i][1:] == (PART, "byte"))
    parts = sum(script == PART for _, script in vocabulary)
    lines.append(
        f"fallback to single bytes: {single_bytes / total:.2%} of the tokens; "
        f"parts of characters in the vocabulary: {parts:,}"
    )
    han = [text.strip() for text, script in vocabulary if script == "Han"]
    longest = sorted(han, key=len)[-LONGEST_SHOWN:]
    longest.reverse()
    lines.append(f"longest Han tokens: {' '.join(longest) or 'none'}")
    lines.append(_line_of_round_trips(tok))
    return "\n".join(lines)


def _line_of_script(
    tok: Tokenizer,
    script: str,
    used: Counter[int],
    described: dict[int, tuple[str, str, str]],
    total: int,
) -> str | None:
    """The line of one script; None if no token of it was used."""
    ids = [i for i in used if described[i][1] == script]
    tokens = sum(used[i] for i in ids)
    if tokens == 0:
        return None
    characters_each = sum(used[i] * len(described[i][0]) for i in ids) / tokens
    bytes_each = sum(used[i] * len(tok.id_to_bytes[i]) for i in ids) / tokens
    shown = "" if script == PART else f"{characters_each:.2f}"
    return f"{script:20} {tokens:10,} {tokens / total:7.1%} {shown:>16} {bytes_each:11.2f}"


def _ordinary_ids(tok: Tokenizer) -> list[int]:
    """The ids that are neither special nor added, in order."""
    added = set(tok.added.values())
    return [i for i in sorted(tok.id_to_bytes) if i not in added]


def _line_of_round_trips(tok: Tokenizer) -> str:
    kept = []
    changed = []
    for name, text in ROUND_TRIPS.items():
        if tok.decode(tok.encode(text)) == text:
            kept.append(name)
        else:
            changed.append(name)
    line = f"come back unchanged: {', '.join(kept)}"
    if changed:
        line += f"; changed: {', '.join(changed)}"
    return line


# ---- The picture


def draw_lengths(tok: Tokenizer, path: str | Path) -> None:
    """Draw how many tokens have 1, 2, 3, ... characters, by script, as a .png. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    counts: dict[str, Counter[int]] = {script: Counter() for script in SCRIPTS}  # by characters
    for i in _ordinary_ids(tok):
        text, script, _ = describe(tok, i)
        length = 0 if script == PART else min(len(text), LONGEST_DRAWN)
        counts[script][length] += 1

    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    lengths = range(LONGEST_DRAWN + 1)
    bottom = [0] * len(lengths)
    for script, counter in counts.items():
        if counter:
            heights = [counter[n] for n in lengths]
            axes.bar(lengths, heights, bottom=bottom, label=script)
            bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    axes.set(
        xlabel="characters (0: part of one)",
        ylabel="tokens",
        title=f"{len(tok):,} tokens by length",
    )
    axes.set_xticks(lengths, [*map(str, range(LONGEST_DRAWN)), f"{LONGEST_DRAWN}+"])
    axes.legend(frameon=False)
    with replacing(path) as beside:
        figure.savefig(beside, dpi=110, format="png")
    plt.close(figure)
