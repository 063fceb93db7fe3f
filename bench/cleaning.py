"""Cleaning beside the original's rules: speed on one core, letters and digits lost, what each rule does by source.

    python bench/cleaning.py --input DIR
    python bench/cleaning.py --input DIR --show 50 --seed 1     documents with their changes, for a person to read

The original's rules are written from their description: spaces become ，; of a run of punctuation the first character
stays, and its punctuation holds a backslash and the letter s, meant as white space; ASCII punctuation becomes Chinese.
Assumed: spaces are U+0020 and U+3000; punctuation is all of ASCII's, the common Chinese marks, dash and ellipsis, but
no line break; of ASCII , . ; : ? ! ( ) become Chinese; no NFKC, as `……` becomes `…`. Lost are ASCII letters and digits
of NFKC(text) that NFKC(cleaned) has no more; outside of tags: of what the rules mojibake and html alone leave. A rule
by its name is one call a document, nanophi.clean all of them until nothing changes. CPU time, medians of three.
"""

import random
import re
import string
import time
import timeit
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import islice
from unicodedata import normalize

from sample import take

from nanophi.cli import flag, run_command
from nanophi.text.clean import Report, clean
from nanophi.text.corpus import read_rows
from nanophi.text.filters import Limits, why_dropped
from nanophi.text.rules import RULES
from nanophi.text.schemas import text_of

PUNCTUATION = frozenset(
    string.punctuation + "，。、；：？！…—·～“”‘’（）《》〈〉【】〔〕「」『』" + "\\s"
)
CHINESE = dict(zip(",.;:?!()", "，。；：？！（）", strict=True))
TAGS = {name: RULES[name] for name in ("mojibake", "html")}


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


def original(text: str) -> str:
    """The original's rules, see above: a character at a time, then a regular expression."""
    text = re.sub("[ \u3000]", "，", text)
    pairs = zip("\n" + text, text, strict=False)
    text = "".join(
        [char for before, char in pairs if char not in PUNCTUATION or before not in PUNCTUATION]
    )
    return re.sub(r"[,.;:?!()]", lambda match: CHINESE[match[0]], text)


def lost(texts: list[str], cleaned: list[str]) -> str:
    """Percent of the ASCII letters and digits."""
    had, has = (
        [Counter(re.findall("[A-Za-z0-9]", normalize("NFKC", t))) for t in side]
        for side in (texts, cleaned)
    )
    missing = sum((before - after).total() for before, after in zip(had, has, strict=True))
    return f"{100 * missing / max(sum(map(Counter.total, had)), 1):.4f}"


def speeds(texts: list[str]) -> None:
    characters, size = (
        sum(map(len, texts)),
        sum(len(text.encode("utf-8", "surrogatepass")) for text in texts),
    )
    print(f"{len(texts):,} documents, {characters:,} characters, {size / 1e6:.1f} MB\n")
    print(
        f"| rules | M characters/s | MB/s | changed | % | letters, digits lost % | outside tags % |\n|{'---|' * 7}"
    )
    for name, rule in {"the original's": original, "nanophi.clean": clean, **RULES}.items():
        cleaned = list(map(rule, texts))  # and what is built at a first call
        times = timeit.repeat(
            lambda rule=rule: list(map(rule, texts)), timer=time.process_time, repeat=3, number=1
        )
        speed, changed = (
            1e-6 / sorted(times)[1],
            sum(a != b for a, b in zip(texts, cleaned, strict=True)),
        )
        gone = lost(texts, cleaned) if rule in (original, clean) else ""
        outside = (
            lost([clean(text, rules=TAGS) for text in texts], cleaned) if rule is clean else ""
        )
        numbers = f"{characters * speed:.2f} | {size * speed:.1f} | {changed:,} | {100 * changed / len(texts):.1f}"
        print(f"| {name} | {numbers} | {gone} | {outside} |", flush=True)


def by_source(rows: list[tuple[str, str]]) -> None:
    reports, columns = defaultdict(Report), [*RULES, "all rules"]
    for source, text in rows:
        cleaned = clean(text, report=(one := Report()))
        one.note("all rules", text, cleaned, again=text == cleaned)
        one.changed.update(documents=1, characters=len(text))
        one.dropped.update(filter(None, [why_dropped(text, cleaned, Limits())]))
        reports[source].add(one)
        reports["all"].add(one)
    print(
        "\nPercent of the documents that a rule changed (characters it removed per 1000; negative: added)\n"
    )
    print(
        f"| source | documents | {' | '.join(columns)} | dropped |\n|{'---|' * (len(columns) + 3)}"
    )
    for name, report in sorted(reports.items(), key=lambda item: (item[0] == "all", item[0])):
        documents, characters = report.changed["documents"], max(report.changed["characters"], 1)
        done = [
            (100 * report.changed[rule] / documents, 1000 * report.removed[rule] / characters)
            for rule in columns
        ]
        cells = " | ".join(
            f"{changed:.2f} ({removed:z.2f})" if changed else "" for changed, removed in done
        )
        dropped = ", ".join(f"{why} {count:,}" for why, count in report.dropped.most_common())
        print(f"| {name} | {documents:,} | {cells} | {dropped} |", flush=True)


def changes(before: str, after: str) -> Iterator[tuple[str, str]]:
    """Changed places with 30 characters on both sides, as they were and as they are; of long ones the beginning."""
    a, b = before.split("\n"), after.split("\n")
    for tag, i, j, k, m in SequenceMatcher(None, a, b).get_opcodes():
        lines = list(zip(a[i:j], b[k:m], strict=False)) if tag != "equal" else []
        for old, new in lines if j - i == m - k else [("\n".join(a[i:j]), "\n".join(b[k:m]))]:
            for group in SequenceMatcher(
                None, old[:3000], new[:3000], autojunk=False
            ).get_grouped_opcodes(30):
                yield old[group[0][1] : group[-1][2]][:100], new[group[0][3] : group[-1][4]][:100]


def show(rows: list[tuple[str, str]], cfg: Config) -> None:
    changed = ((source, text) for source, text in rows if clean(text) != text)
    for number, (source, text) in enumerate(islice(changed, cfg.show), 1):
        print(f"\n{number}. {source}, {len(text):,} characters")
        found = []
        for (
            name,
            rule,
        ) in RULES.items():  # each once, so that what a second round would do is not shown
            before, text = text, rule(text)
            places = list(changes(before, text))
            random.Random(cfg.seed).shuffle(places)
            found += [(turn, name, *place) for turn, place in enumerate(places)]
        for _, name, old, new in sorted(found)[:5]:
            print(f"  {name:12} - {old!r}\n{'':14} + {new!r}")


def main(cfg: Config) -> None:
    rows = list(read_rows(cfg.input, use=lambda row: (row.get("source", "none"), text_of(row))))
    random.Random(cfg.seed).shuffle(rows)
    if cfg.show:
        return show(rows, cfg)
    speeds(take([text for _, text in rows if text], cfg.characters))
    by_source(rows)


if __name__ == "__main__":
    run_command(Config, main)
