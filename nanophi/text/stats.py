"""What a corpus holds: a table to print and a picture.

    python -m nanophi.text.stats --input text/ --tokenizer out/tokenizer --plot corpus.png

The table has one line for each source, and one for all of them. With made-up numbers:

    source    documents   characters  share    tokens  a document    Han  Latin digits punctu  other
    wiki         12,040    9,120,337  81.2%         -         402  81.0%   4.1%   2.0%  12.9%   0.0%
    all          20,113   11,230,001 100.0%         -         310  83.5%   3.2%   1.7%  11.6%   0.0%

"a document" is the median length in characters. Below the table stand the lengths of documents by
percentile, and how many documents are repeated or nearly repeated (dedup.py). tokenizer/report.py
says what a tokenizer holds.

Read in this order: `Group`, `corpus_table`, `main`; `draw_corpus` draws the picture.
"""

from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nanophi.claims import Output, claim
from nanophi.cli import Progress, UserError, flag, run_command
from nanophi.files import replacing
from nanophi.parallel import batches
from nanophi.text.corpus import Reading, Skipped
from nanophi.text.dedup import Restartable, find_clusters
from nanophi.text.schemas import text_of, with_texts
from nanophi.tokenizer.report import script_of
from nanophi.tokenizer.tokenizer import Tokenizer

SCRIPTS = ("Han", "Latin", "digits", "punctuation")  # a column each; "other" is the last one
PERCENTILES = (1, 10, 25, 50, 75, 90, 99, 100)
BATCH_CHARACTERS = 500_000  # read and encoded together
SOURCES_DRAWN = 12  # the largest ones

# ---- Counting


@dataclass
class Group:
    """What the documents of one source hold."""

    lengths: array = field(default_factory=lambda: array("q"))  # characters of each document
    characters: Counter = field(default_factory=Counter)  # character -> how often
    tokens: int = 0

    @property
    def size(self) -> int:
        """Characters of all documents."""
        return sum(self.lengths)

    def add(self, text: str, tokens: int) -> None:
        """Count one document."""
        self.lengths.append(len(text))
        self.characters.update(text)
        self.tokens += tokens

    def scripts(self) -> dict[str, float]:
        """The share of each script in the characters; white space is left out.

        >>> group = Group()
        >>> group.add("我有 2 cats", tokens=0)
        >>> {script: round(share, 2) for script, share in group.scripts().items()}
        {'Han': 0.29, 'Latin': 0.57, 'digits': 0.14, 'punctuation': 0.0, 'other': 0.0}
        """
        counts: Counter[str] = Counter()
        for char, times in self.characters.items():
            counts[script_of(char)] += times
        total = max(counts.total() - counts["space"], 1)
        shares = {script: counts[script] / total for script in SCRIPTS}
        shares["other"] = counts["mixed"] / total
        return shares


def together(groups: dict[str, Group]) -> Group:
    """All groups as one."""
    whole = Group()
    for group in groups.values():
        whole.lengths.extend(group.lengths)
        whole.characters.update(group.characters)
        whole.tokens += group.tokens
    return whole


def by_size(groups: dict[str, Group]) -> list[str]:
    """The names of the groups, the largest first."""
    return sorted(groups, key=lambda name: -groups[name].size)


# ---- The table


def corpus_table(groups: dict[str, Group], with_tokens: bool) -> str:
    """One line for each source: documents, characters, tokens, lengths, scripts."""
    head = (
        f"{'source':22} {'documents':>10} {'characters':>13} {'share':>6} {'tokens':>12} "
        f"{'a document':>10}"
    )
    for script in (*SCRIPTS, "other"):
        head += f" {script[:6]:>6}"
    whole = together(groups)
    lines = [head]
    for name in by_size(groups):
        lines.append(_table_line(name, groups[name], whole.size, with_tokens))
    lines.append(_table_line("all", whole, whole.size, with_tokens))

    lengths = np.percentile(whole.lengths, PERCENTILES).astype(int)
    marks = [f"{mark} %: {length:,}" for mark, length in zip(PERCENTILES, lengths, strict=True)]
    lines.append(f"length of a document in characters, {', '.join(marks)}")
    return "\n".join(lines)


def _table_line(name: str, group: Group, all_characters: int, with_tokens: bool) -> str:
    size = group.size
    share = size / max(all_characters, 1)
    tokens = f"{group.tokens:,}" if with_tokens else "-"
    median = int(np.median(group.lengths))
    line = (
        f"{name[:22]:22} {len(group.lengths):>10,} {size:>13,} {share:>6.1%} {tokens:>12} "
        f"{median:>10,}"
    )
    for share_of_script in group.scripts().values():
        line += f" {share_of_script:>6.1%}"
    return line


# ---- The picture


def draw_corpus(groups: dict[str, Group], path: str | Path) -> None:
    """Draw documents by length, and the share of scripts in each source, as a .png.

    Needs matplotlib.
    """
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
    _draw_lengths(left, groups)
    _draw_scripts(right, groups)
    with replacing(path) as beside:
        figure.savefig(beside, dpi=110, format="png")
    plt.close(figure)


def _draw_lengths(axes: Any, groups: dict[str, Group]) -> None:
    lengths = together(groups).lengths
    edges = np.geomspace(1, max(max(lengths), 2) + 1, 40)
    axes.hist(lengths, edges, color="#4878a8")
    axes.set(xscale="log", xlabel="characters of a document", ylabel="documents", title="lengths")


def _draw_scripts(axes: Any, groups: dict[str, Group]) -> None:
    """One bar for each source, the largest on top."""
    names = by_size(groups)[:SOURCES_DRAWN]
    shares = [groups[name].scripts() for name in names]
    start = np.zeros(len(names))
    for script in (*SCRIPTS, "other"):
        widths = np.array([share[script] for share in shares])
        axes.barh(names, widths, left=start, label=script)
        start += widths
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), title="scripts, white space left out")
    axes.legend(frameon=False, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.06), fontsize=8)


# ---- The command


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
    inputs = cfg.files(cfg.plot)
    if cfg.plot:
        require_matplotlib()
    with claim(inputs, Output("--plot", cfg.plot, suffix=".png")):
        return measure(cfg, inputs)


def require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install 'nanophi[plot]'") from None


def measure(cfg: Config, inputs: list[Path]) -> dict[str, Group]:
    tok = Tokenizer.load(cfg.tokenizer) if cfg.tokenizer else None
    skipped = Skipped()
    groups = count(cfg, inputs, tok, skipped)
    if not groups:
        raise UserError(f"no text in {', '.join(cfg.input)}; {skipped}")
    print(f"{skipped}{corpus_table(groups, tok is not None)}")
    if cfg.duplicates:
        print_repeated(cfg, inputs, groups)
    if cfg.plot:
        draw_corpus(groups, cfg.plot)
    return groups


def count(
    cfg: Config, inputs: list[Path], tok: Tokenizer | None, skipped: Skipped
) -> dict[str, Group]:
    """Read all documents and count them by source."""
    groups: dict[str, Group] = defaultdict(Group)
    shown = rows_of(cfg, inputs, skipped)
    for rows in batches(shown, BATCH_CHARACTERS, lambda row: len(text_of(row))):
        texts = [text_of(row) for row in rows]
        tokens = [len(ids) for ids in tok.encode_stream(texts)] if tok else [0] * len(rows)
        for row, text, number in zip(rows, texts, tokens, strict=True):
            groups[str(row.get(cfg.by, "all"))].add(text, number)
    return groups


def rows_of(cfg: Config, inputs: list[Path], skipped: Skipped) -> Iterator[dict]:
    """The rows with a text; progress is shown."""
    with Progress("rows", None) as bar:
        for row in cfg.rows(skipped, with_texts, inputs):
            yield row
            bar.update()


def print_repeated(cfg: Config, inputs: list[Path], groups: dict[str, Group]) -> None:
    """Find near-duplicates and print how many documents could go."""
    clusters = find_clusters(Restartable(lambda: cfg.rows(Skipped(), text_of, inputs)))
    repeated = sum(map(len, clusters)) - len(clusters)
    documents = sum(len(group.lengths) for group in groups.values())
    print(
        f"repeated or nearly repeated: {repeated:,} documents ({repeated / documents:.1%}), "
        f"in {len(clusters):,} clusters"
    )


if __name__ == "__main__":
    run_command(Config, main)
