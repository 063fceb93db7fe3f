"""What a corpus holds, and what a tokenizer: tables to print and pictures.

    python -m nanophi.text.stats --input text/ --tokenizer out/tokenizer --plot corpus.png

Of a tokenizer: vocab.tsv to read, how well it serves each script, and the lengths of its tokens; train_tokenizer.py
calls these.
"""

import unicodedata
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nanophi.cli import Progress, UserError, flag, run_command
from nanophi.files import replacing, write_text
from nanophi.parallel import batches
from nanophi.text.corpus import Reading, Skipped
from nanophi.text.dedup import Again, find_clusters
from nanophi.text.schemas import text_of, with_texts
from nanophi.tokenizer.levels import BYTE_TOKENS
from nanophi.tokenizer.tokenizer import Tokenizer

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
            found.add(
                "Han"
                if "CJK" in unicodedata.name(char, "")
                else "Latin"
                if ord(char) < 0x250
                else "mixed"
            )
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
    kind = (
        ("byte" if tok.level.name == "byte" or spelling in BYTE_TOKENS else "character")
        if base
        else "merge"
    )
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
        merge = "".join(
            c if c.isprintable() else c.encode("unicode_escape").decode() for c in merge
        )
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
    lines = [
        f"{'script':20} {'tokens':>10} {'share':>7} {'characters each':>16} {'bytes each':>11}"
    ]
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
    longest = sorted((text.strip() for text, script in whole if script == "Han"), key=len)[-8:][
        ::-1
    ]
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
    axes.set(
        xlabel="characters (0: part of one)",
        ylabel="tokens",
        title=f"{len(tok):,} tokens by length",
    )
    axes.set_xticks(range(13), [*map(str, range(12)), "12+"])
    axes.legend(frameon=False)
    with replacing(path) as beside:
        figure.savefig(beside, dpi=110, format="png")
    plt.close(figure)


# ---- corpora


@dataclass
class Group:
    """What documents of one source hold."""

    lengths: array = field(default_factory=lambda: array("q"))  # characters of each document
    characters: Counter = field(default_factory=Counter)
    tokens: int = 0

    def scripts(self) -> dict[str, float]:
        """Share of each script in the characters, white space left out."""
        found = Counter()
        for char, times in self.characters.items():
            found[script_of(char)] += times
        total = max(found.total() - found["space"], 1)
        return {name: found[name] / total for name in SCRIPTS[:4]} | {
            "other": found["mixed"] / total
        }


def corpus_table(groups: dict[str, Group], with_tokens: bool) -> str:
    """One line a source: documents, characters, tokens, lengths, scripts."""
    scripts = [*SCRIPTS[:4], "other"]
    head = f"{'source':22} {'documents':>10} {'characters':>13} {'share':>6} {'tokens':>12} {'a document':>10}"
    lines = [head + "".join(f" {name[:6]:>6}" for name in scripts)]
    everything = max(sum(sum(group.lengths) for group in groups.values()), 1)
    whole = Group(array("q", [n for g in groups.values() for n in g.lengths]), Counter(), 0)
    for group in groups.values():
        whole.characters.update(group.characters)
        whole.tokens += group.tokens
    for name, group in [
        *sorted(groups.items(), key=lambda item: -sum(item[1].lengths)),
        ("all", whole),
    ]:
        size = sum(group.lengths)
        tokens = f"{group.tokens:,}" if with_tokens else "-"
        median = int(np.median(group.lengths))
        line = f"{name[:22]:22} {len(group.lengths):>10,} {size:>13,} {size / everything:>6.1%} {tokens:>12} {median:>10,}"
        lines.append(line + "".join(f" {share:>6.1%}" for share in group.scripts().values()))
    marks = (1, 10, 25, 50, 75, 90, 99, 100)
    lengths = zip(marks, np.percentile(whole.lengths, marks).astype(int), strict=True)
    lines.append(
        "length of a document in characters, "
        + ", ".join(f"{mark} %: {n:,}" for mark, n in lengths)
    )
    return "\n".join(lines)


def draw_corpus(groups: dict[str, Group], path: str | Path) -> None:
    """Documents by length, and the share of scripts in each source. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["font.sans-serif"] = [
        "DejaVu Sans",
        "Noto Sans CJK SC",
        "PingFang SC",
        "Microsoft YaHei",
        "SimHei",
    ]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    largest = sorted(groups, key=lambda name: -sum(groups[name].lengths))[:12]
    longest = max(max(groups[name].lengths) for name in groups)
    edges = np.geomspace(1, max(longest, 2) + 1, 40)
    left.hist([n for group in groups.values() for n in group.lengths], edges, color="#4878a8")
    left.set(xscale="log", xlabel="characters of a document", ylabel="documents", title="lengths")
    start = np.zeros(len(largest))
    for script in groups[largest[0]].scripts():
        shares = np.array([groups[name].scripts()[script] for name in largest])
        right.barh(largest, shares, left=start, label=script)
        start += shares
    right.invert_yaxis()
    right.set(xlim=(0, 1), title="scripts, white space left out")
    right.legend(
        frameon=False, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.06), fontsize=8
    )
    with replacing(path) as beside:
        figure.savefig(beside, dpi=110, format="png")
    plt.close(figure)


@dataclass(kw_only=True)
class Config(Reading):
    tokenizer: str | None = flag(None, help="also count the tokens of this tokenizer")
    by: str = flag(
        "source", help="key of a row that names its source; rows without it are counted together"
    )
    plot: str | None = flag(None, help="draw lengths and scripts into this .png")
    duplicates: bool = flag(
        True, help="count repeated documents too (the text is then read three times)"
    )


def main(cfg: Config) -> dict[str, Group]:
    """Print the table; returns what it counted, by source."""
    tok = Tokenizer.load(cfg.tokenizer) if cfg.tokenizer else None
    groups, skipped = defaultdict(Group), Skipped()

    def rows() -> Iterator[dict]:
        with Progress("rows", None) as bar:
            for row in cfg.rows(skipped, with_texts):
                yield row
                bar.update()

    for some in batches(rows(), 500_000, lambda row: len(text_of(row))):
        texts = [text_of(row) for row in some]
        tokens = map(len, tok.encode_stream(texts)) if tok else [0] * len(some)
        for row, text, count in zip(some, texts, tokens, strict=True):
            group = groups[str(row.get(cfg.by, "all"))]
            group.lengths.append(len(text))
            group.characters.update(text)
            group.tokens += count
    if not groups:
        raise UserError(f"no text in {', '.join(cfg.input)}; {skipped}")
    print(f"{skipped}{corpus_table(groups, tok is not None)}")
    if cfg.duplicates:
        clusters = find_clusters(Again(lambda: cfg.rows(Skipped(), text_of)))
        again = sum(map(len, clusters)) - len(clusters)
        documents = sum(len(group.lengths) for group in groups.values())
        print(
            f"repeated or nearly repeated: {again:,} documents ({again / documents:.1%}), in {len(clusters):,} clusters"
        )
    if cfg.plot:
        try:
            draw_corpus(groups, cfg.plot)
        except ImportError:
            raise UserError("--plot needs matplotlib: pip install 'nanophi[plot]'") from None
    return groups


if __name__ == "__main__":
    run_command(Config, main)
