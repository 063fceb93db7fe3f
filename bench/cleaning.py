"""Cleaning beside the original's rules: speed on one core, letters and digits lost, and what each
rule does by source.

    python bench/cleaning.py --input DIR
    python bench/cleaning.py --input DIR --show 50 --seed 1     changed documents, to be read

The original's rules are written from their description, see `original`.

A rule under its own name is one call per document; nanophi.clean calls all of them until nothing
changes. Speed is CPU time, the median of three.

Lost are the ASCII letters and digits that NFKC(text) has and NFKC(cleaned) has not. "Outside tags"
counts from what the rules mojibake and html alone leave.
"""

import random
import re
import string
import time
import timeit
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import islice
from unicodedata import normalize

from sample import take
from table import print_head, print_row

from nanophi.cli import flag, run_command
from nanophi.text.clean import Report, clean
from nanophi.text.corpus import read_rows
from nanophi.text.filters import Limits, why_dropped
from nanophi.text.rules import RULES
from nanophi.text.schemas import text_of

# All of ASCII's punctuation, the common Chinese marks, dash and ellipsis, but no line break. The
# original's set holds a backslash and the letter s, which were meant as white space (\s).
PUNCTUATION = frozenset(
    string.punctuation + "，。、；：？！…—·～“”‘’（）《》〈〉【】〔〕「」『』" + "\\s"
)
CHINESE = dict(zip(",.;:?!()", "，。；：？！（）", strict=True))
TAG_RULES = {name: RULES[name] for name in ("mojibake", "html")}


@dataclass(kw_only=True)
class Config:
    input: list[str] = flag(help="documents: files, directories or globs")
    characters: int = flag(
        10_000_000, at_least=1, help="characters of the first table; the second takes all documents"
    )
    seed: int = flag(0, help="order of the documents")
    show: int | None = flag(
        None, at_least=1, help="instead: so many changed documents, five changes of each at most"
    )


def main(cfg: Config) -> None:
    rows = list(read_rows(cfg.input, use=lambda row: (row.get("source", "none"), text_of(row))))
    random.Random(cfg.seed).shuffle(rows)
    if cfg.show:
        show_documents(rows, cfg)
        return
    print_speeds(take([text for _, text in rows if text], cfg.characters))
    print_by_source(rows)


def original(text: str) -> str:
    """The original's rules: one character at a time, then a regular expression.

    Spaces (U+0020 and U+3000) become ，. Of a run of punctuation the first character stays. The
    ASCII marks , . ; : ? ! ( ) become Chinese ones. There is no NFKC, so `……` becomes `…`.

    >>> original("感冒了!!  多喝水...")
    '感冒了！多喝水。'
    >>> original("class")  # the letter s is in its set of punctuation
    'clas'
    """
    text = re.sub("[ \u3000]", "，", text)
    pairs = zip("\n" + text, text, strict=False)
    text = "".join(
        [char for before, char in pairs if char not in PUNCTUATION or before not in PUNCTUATION]
    )
    return re.sub(r"[,.;:?!()]", lambda match: CHINESE[match[0]], text)


# ---- the first table: speed and losses of each rule


def print_speeds(texts: list[str]) -> None:
    characters = sum(map(len, texts))
    size = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    print(f"{len(texts):,} documents, {characters:,} characters, {size / 1e6:.1f} MB\n")
    print_head(
        "rules",
        "M characters/s",
        "MB/s",
        "changed",
        "%",
        "letters, digits lost %",
        "outside tags %",
    )
    for name, rule in {"the original's": original, "nanophi.clean": clean, **RULES}.items():
        cleaned = list(map(rule, texts))  # This first call also builds the tables of the rule.
        seconds = median_cpu_seconds(rule, texts)
        changed = sum(a != b for a, b in zip(texts, cleaned, strict=True))
        lost = ""
        lost_outside_tags = ""
        if rule in (original, clean):
            lost = lost_share(texts, cleaned)
        if rule is clean:
            without_tags = [clean(text, rules=TAG_RULES) for text in texts]
            lost_outside_tags = lost_share(without_tags, cleaned)
        print_row(
            name,
            f"{characters * 1e-6 / seconds:.2f}",
            f"{size * 1e-6 / seconds:.1f}",
            f"{changed:,}",
            f"{100 * changed / len(texts):.1f}",
            lost,
            lost_outside_tags,
        )


def median_cpu_seconds(rule: Callable[[str], str], texts: list[str]) -> float:
    times = timeit.repeat(
        lambda: list(map(rule, texts)), timer=time.process_time, repeat=3, number=1
    )
    return sorted(times)[1]


def lost_share(texts: list[str], cleaned: list[str]) -> str:
    """How many percent of the ASCII letters and digits are lost.

    >>> lost_share(["ab12"], ["ab1"])
    '25.0000'
    """
    lost = 0
    total = 0
    for text, clean_text in zip(texts, cleaned, strict=True):
        before = letters_and_digits(text)
        after = letters_and_digits(clean_text)
        lost += (before - after).total()
        total += before.total()
    return f"{100 * lost / max(total, 1):.4f}"


def letters_and_digits(text: str) -> Counter:
    return Counter(re.findall("[A-Za-z0-9]", normalize("NFKC", text)))


# ---- the second table: what each rule does by source


def print_by_source(rows: list[tuple[str, str]]) -> None:
    """A row for each source, the row of all sources last."""
    reports = reports_by_source(rows)
    columns = [*RULES, "all rules"]
    print(
        "\nPercent of the documents that a rule changed "
        "(characters it removed per 1000; negative: added)\n"
    )
    print_head("source", "documents", *columns, "dropped")
    for source in sorted(reports, key=lambda source: (source == "all", source)):
        report = reports[source]
        cells = [changed_cell(report, rule) for rule in columns]
        dropped = [f"{why} {count:,}" for why, count in report.dropped.most_common()]
        print_row(source, f"{report.changed['documents']:,}", *cells, ", ".join(dropped))


def reports_by_source(rows: list[tuple[str, str]]) -> dict[str, Report]:
    """Source -> report of its documents, and "all" -> report of all documents.

    Beside the rules, each report counts "all rules", "documents" and "characters" in `changed`.
    """
    reports: dict[str, Report] = defaultdict(Report)
    for source, text in rows:
        report = Report()
        cleaned = clean(text, report=report)
        report.note("all rules", text, cleaned, first=text != cleaned)
        report.changed.update(documents=1, characters=len(text))
        why = why_dropped(text, cleaned, Limits())
        if why:
            report.dropped[why] += 1
        reports[source].add(report)
        reports["all"].add(report)
    return reports


def changed_cell(report: Report, rule: str) -> str:
    """Percent of the documents that a rule changed, and characters it removed per 1000."""
    changed = 100 * report.changed[rule] / report.changed["documents"]
    removed = 1000 * report.removed[rule] / max(report.changed["characters"], 1)
    return f"{changed:.2f} ({removed:z.2f})" if changed else ""


# ---- --show: changed documents for a person to read


def show_documents(rows: list[tuple[str, str]], cfg: Config) -> None:
    """Print the first --show changed documents, five changes of each at most."""
    changed = ((source, text) for source, text in rows if clean(text) != text)
    for number, (source, text) in enumerate(islice(changed, cfg.show), 1):
        print(f"\n{number}. {source}, {len(text):,} characters")
        for rule, old, new in sampled_changes(text, cfg.seed)[:5]:
            print(f"  {rule:12} - {old!r}\n{'':14} + {new!r}")


def sampled_changes(text: str, seed: int) -> list[tuple[str, str, str]]:
    """(rule, old, new): first one random change of each rule, then a second one of each, ...

    Each rule is called once, so a change that only a second round would make is not shown.
    """
    numbered = []
    for name, rule in RULES.items():
        cleaned = rule(text)
        places = list(changed_places(text, cleaned))
        random.Random(seed).shuffle(places)
        numbered += [(number, name, old, new) for number, (old, new) in enumerate(places)]
        text = cleaned
    return [(name, old, new) for _, name, old, new in sorted(numbered)]


def changed_places(before: str, after: str) -> Iterator[tuple[str, str]]:
    """(old, new) of each changed place, with 30 characters on both sides; of long ones the first
    100 characters.
    """
    for old, new in changed_blocks(before.split("\n"), after.split("\n")):
        # SequenceMatcher takes quadratic time, so only the first 3,000 characters are compared.
        matcher = SequenceMatcher(None, old[:3000], new[:3000], autojunk=False)
        for group in matcher.get_grouped_opcodes(30):
            _, old_start, _, new_start, _ = group[0]
            _, _, old_stop, _, new_stop = group[-1]
            yield old[old_start:old_stop][:100], new[new_start:new_stop][:100]


def changed_blocks(before: list[str], after: list[str]) -> Iterator[tuple[str, str]]:
    """(old, new) of the changed lines: one by one where their number stays, otherwise as a block.

    >>> list(changed_blocks(["a", "b", "c"], ["a", "B", "c", "d"]))
    [('b', 'B'), ('', 'd')]
    """
    for tag, i, j, k, m in SequenceMatcher(None, before, after).get_opcodes():
        if tag == "equal":
            continue
        if j - i == m - k:
            yield from zip(before[i:j], after[k:m], strict=True)
        else:
            yield "\n".join(before[i:j]), "\n".join(after[k:m])


if __name__ == "__main__":
    run_command(Config, main)
