"""What a tokenizer holds and how well it serves: vocab.tsv to read, a report to print, a picture of token lengths."""

import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from nanophi.files import replacing, write_text
from nanophi.text.levels import BYTE_TOKENS
from nanophi.text.tokenizer import Tokenizer

ROUND_TRIPS = {
    "tab": "a\tb", "line breaks": "一\n\n二", "spaces": "一    二", "emoji": "😀👨‍👩‍👧", "rare Han": "㐀𠮷龘",
    "full width": "ＡＢ１２，！", "combining": "e\u0301", "template": "##提问:\n问\n##回答:\n答",
}  # fmt: skip
SCRIPTS = ("Han", "Latin", "digits", "punctuation", "space", "mixed", "part of a character")


def script_of(text: str) -> str:
    """Han, Latin, digits, punctuation (symbols too) or space; mixed where a token has several."""
    found = set()
    for char in text:
        kind = unicodedata.category(char)
        if char.isspace():
            found.add("space")
        elif kind[0] == "N":
            found.add("digits")
        elif kind[0] in "PSC":
            found.add("punctuation")
        else:
            found.add("Han" if "CJK" in unicodedata.name(char, "") else "Latin" if ord(char) < 0x250 else "mixed")
    if len(found) > 1:
        found.discard("space")  # " the" is Latin
    return found.pop() if len(found) == 1 else "mixed"


def describe(tok: Tokenizer, token_id: int) -> tuple[str, str, str]:
    """(readable text, script, kind) of a token; what is no whole character shows as its bytes, <E4><B8>."""
    raw = tok.id_to_bytes[token_id]
    if token_id in tok.added.values():
        return raw.decode(), "mixed", "special" if raw.decode() in tok.specials else "added"
    spelling = tok.spelling[token_id]
    base = len(spelling) == 1 or (tok.level.byte_fallback and spelling in BYTE_TOKENS)
    kind = ("byte" if tok.level.name == "byte" or spelling in BYTE_TOKENS else "character") if base else "merge"
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return "".join(f"<{byte:02X}>" for byte in raw), "part of a character", kind
    return text, script_of(text), kind


def write_vocabulary(tok: Tokenizer, path: str | Path) -> None:
    """vocab.tsv: id, text, bytes, kind, count and the merge it came from. count: how often the pair stood in the
    training text when it was merged; text: white space and control characters escaped."""
    came_from = {merged: pair for pair, (_, merged) in tok.merges.items()}
    counts = dict(zip(tok.merge_list, tok.merge_counts, strict=False))
    lines = ["id\ttext\tbytes\tkind\tcount\tmerge"]
    for token_id in sorted(tok.id_to_bytes):
        text, _, kind = describe(tok, token_id)
        shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
        pair = came_from.get(token_id)
        merge = " + ".join(describe(tok, part)[0] for part in pair) if pair else ""
        merge = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in merge)
        raw = tok.id_to_bytes[token_id].hex(" ")
        lines.append(f"{token_id}\t{shown}\t{raw}\t{kind}\t{counts.get(pair, '')}\t{merge}")
    write_text(path, "\n".join(lines) + "\n")


def report(tok: Tokenizer, texts: Iterable[str]) -> str:
    """Characters and bytes per token on some texts, by script; longest tokens; what comes back from encoding."""
    used, characters = Counter(), 0
    for text in texts:
        characters += len(text)
        used.update(tok.encode(text))
    described = {i: describe(tok, i) for i in used}
    lines = [f"{'script':20} {'tokens':>10} {'share':>7} {'characters each':>16} {'bytes each':>11}"]
    total = max(sum(used.values()), 1)
    for script in SCRIPTS:
        ids = [i for i in used if described[i][1] == script]
        tokens = sum(used[i] for i in ids)
        if tokens:
            each = sum(used[i] * len(described[i][0]) for i in ids) / tokens
            size = sum(used[i] * len(tok.id_to_bytes[i]) for i in ids) / tokens
            shown = "" if script == SCRIPTS[-1] else f"{each:.2f}"
            lines.append(f"{script:20} {tokens:10,} {tokens / total:7.1%} {shown:>16} {size:11.2f}")
    size = sum(used[i] * len(tok.id_to_bytes[i]) for i in used) / total
    lines.append(f"{'all':20} {total:10,} {'':7} {characters / total:16.2f} {size:11.2f}")
    fallback = sum(used[i] for i in used if described[i][1:] == (SCRIPTS[-1], "byte"))
    whole = [describe(tok, i)[:2] for i in sorted(tok.id_to_bytes) if i not in tok.added.values()]
    longest = sorted((text.strip() for text, script in whole if script == "Han"), key=len)[-8:][::-1]
    lost = [name for name, text in ROUND_TRIPS.items() if tok.decode(tok.encode(text)) != text]
    lines += [
        f"fallback to single bytes: {fallback / total:.2%} of the tokens; parts of characters in the vocabulary: "
        f"{sum(script == SCRIPTS[-1] for _, script in whole):,}",
        f"longest Han tokens: {' '.join(longest) or 'none'}",
        f"come back unchanged: {', '.join(n for n in ROUND_TRIPS if n not in lost)}"
        + (f"; changed: {', '.join(lost)}" if lost else ""),
    ]
    return "\n".join(lines)


def draw_lengths(tok: Tokenizer, path: str | Path) -> None:
    """How many tokens have 1, 2, 3, ... characters, by script. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lengths = {script: Counter() for script in SCRIPTS}
    for i in sorted(tok.id_to_bytes):
        if i not in tok.added.values():
            text, script, _ = describe(tok, i)
            lengths[script][0 if script == SCRIPTS[-1] else min(len(text), 12)] += 1
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    bottom = [0] * 13
    for script, counter in lengths.items():
        if counter:
            axes.bar(range(13), [counter[n] for n in range(13)], bottom=bottom, label=script)
            bottom = [below + counter[n] for n, below in enumerate(bottom)]
    axes.set(xlabel="characters (0: part of one)", ylabel="tokens", title=f"{len(tok):,} tokens by length")
    axes.set_xticks(range(13), [*map(str, range(12)), "12+"])
    axes.legend(frameon=False)
    with replacing(path) as beside:
        figure.savefig(beside, dpi=110, format="png")
    plt.close(figure)
