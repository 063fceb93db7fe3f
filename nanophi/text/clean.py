"""Cleaning: rules change texts until nothing changes any more, filters drop documents.

The rules stand in rules.py, the filters in filters.py. A report says what each of them did.

    python -m nanophi.text.clean --input raw/ --out clean.jsonl --dedup
    python -m nanophi.text.clean --input crawl/ --out clean.jsonl.zst --workers 8 \\
        --shard-rows 100000 --resume

Rules change texts, filters drop documents:

    row -> clean_row: rules until nothing changes -> why_dropped: filters -> cleaned row, or dropped

A conversation in which user and assistant do not take turns is dropped, too: training takes none.

Questions, which people type without a full stop, get none: `clean(text, final=False)`. For your own
list of rules: `clean(text, rules={**RULES, "mine": str.strip})`.

Cleaning is a step of its own: the training scripts never clean.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Literal

from nanophi.claims import claim
from nanophi.cli import Progress, UserError, flag, run_command
from nanophi.expect import Expected, check
from nanophi.files import replacing, together
from nanophi.parallel import batches, ordered
from nanophi.text.corpus import Reading, Skipped
from nanophi.text.filters import Limits, why_dropped
from nanophi.text.formats import format_of, opened, write_jsonl
from nanophi.text.outputs import Numbered, kept_rows, rows_output, write_rows
from nanophi.text.rules import RULES, Rule, simplify, without_joints
from nanophi.text.schemas import (
    asked_keys,
    is_pair,
    learned_keys,
    messages_of,
    text_of,
    texts_of,
    turn_keys,
    turns_keys,
    with_texts,
)
from nanophi.text.share import in_share
from nanophi.tokenizer.template import check as check_conversation

SHOWN = 16  # characters of a sample in the report
BATCH = 200_000  # characters that a process gets at once
# How often all rules are applied to a text before its joints go, and once more so often at most: a
# user's own rules may never settle. Ordinary text needs two or three sweeps.
SWEEPS = 10


# ---- 1. the report


@dataclass
class Report:
    """What each rule did, and what each filter dropped."""

    changed: Counter = field(default_factory=Counter)  # rule -> texts that it changed
    # rule -> characters that it removed, negative where it added some
    removed: Counter = field(default_factory=Counter)
    # rule -> a piece of the first text that it changed, before and after
    sample: dict[str, tuple[str, str]] = field(default_factory=dict)
    dropped: Counter = field(default_factory=Counter)  # filter -> documents

    def note(self, rule: str, before: str, after: str, first: bool) -> None:
        """A rule changed a text; first: it had not changed this text before."""
        if first:
            self.changed[rule] += 1
        self.removed[rule] += len(before) - len(after)
        if rule not in self.sample:
            self.sample[rule] = _around_first_difference(before, after)

    def add(self, other: "Report") -> None:
        self.changed += other.changed
        self.removed.update(other.removed)  # `+=` would lose the negative ones
        self.dropped += other.dropped
        self.sample = other.sample | self.sample

    def __str__(self) -> str:
        lines = [f"  {'rule':12} {'texts':>9} {'characters':>12}   sample"]
        for rule in [*RULES, *(self.changed.keys() - RULES.keys())]:
            before, after = self.sample.get(rule, ("", ""))
            sample = f"{before!r} -> {after!r}" if before else ""
            lines.append(
                f"  {rule:12} {self.changed[rule]:>9,} {-self.removed[rule]:>+12,}   {sample}"
            )
        dropped = ", ".join(f"{name} {count:,}" for name, count in self.dropped.most_common())
        lines.append(f"  dropped: {dropped or 'none'}")
        return "\n".join(lines)


def _around_first_difference(before: str, after: str) -> tuple[str, str]:
    """Both texts from six characters before the first place where they differ, SHOWN characters.

    >>> _around_first_difference("他说：昨天的天气很好,今天也好", "他说：昨天的天气很好，今天也好")
    ('天的天气很好,今天也好', '天的天气很好，今天也好')
    """
    same = 0  # characters at the beginning that are the same
    for old, new in zip(before, after, strict=False):
        if old != new:
            break
        same += 1
    start = max(0, min(same, len(before) - 1) - 6)
    return before[start : start + SHOWN], after[start : start + SHOWN]


# ---- 2. a text, a row


def clean(
    text: str, final: bool = True, report: Report | None = None, rules: dict[str, Rule] = RULES
) -> str:
    """Apply the rules until they change nothing, so that clean(clean(x)) == clean(x).

    final: whether to apply the rule that ends a text in 。 too: for documents and answers, but not
        for questions, which people type without a full stop
    report: notes what each rule changes

    >>> clean("&lt;p&gt;Ｐｙｔｈｏｎ很好用!!!頭髮很長")
    'Python很好用！头发很长。'
    """
    check(text, Expected(str), "the text")
    names = [name for name in rules if final or name != "final"]
    changed: set[str] = set()  # the rules that have changed this text
    quiet = 0  # how many rules in a row have changed nothing
    for sweep in range(2 * SWEEPS):
        if sweep >= SWEEPS:
            text = without_joints(text, names)
            quiet = 0
        for name in names:
            before = text
            text = rules[name](text)
            if text == before:
                quiet += 1
            else:
                quiet = 0
                if report is not None:
                    report.note(name, before, text, first=name not in changed)
                    changed.add(name)
            if quiet == len(names):
                return text
    return text


def clean_row(row: dict, report: Report | None = None, rules: dict[str, Rule] = RULES) -> dict:
    """Clean the texts of a row of any schema; its other keys stay as they are. Questions get no
    final punctuation.

    >>> clean_row({"prompt": "１加１等于几", "response": "等于２ ", "source": "Ａ"})
    {'prompt': '1加1等于几', 'response': '等于2', 'source': 'Ａ'}
    """
    cleaned = dict(row)
    learned = learned_keys()
    for key in (*asked_keys(), *learned):
        if key in row:
            cleaned[key] = clean(row[key], key in learned, report, rules)
    for key in turns_keys():
        if key in row:
            roles = [message["role"] for message in messages_of({key: row[key]})]
            cleaned[key] = []
            for turn, role in zip(row[key], roles, strict=True):
                _, text_key = turn_keys(turn)
                text = clean(turn[text_key], role == "assistant", report, rules)
                cleaned[key].append(turn | {text_key: text})
    return cleaned


# ---- 3. the flags


@dataclass(kw_only=True)
class Config(Reading, Limits):
    out: str = flag(help="file to write: .jsonl, .jsonl.gz, .parquet, ...")
    dedup: bool = flag(
        False,
        help="drop repeated and nearly repeated rows (see nanophi.text.dedup, which can do more)",
    )
    without: list[str] | None = flag(None, help=f"rules to leave out, of: {' '.join(RULES)}")
    script: Literal["t2s", "tw2s", "hk2s"] = flag(
        "t2s", help="OpenCC's table of the rule simplified"
    )
    dropped: str | None = flag(None, help="write what was dropped, and why, into this file")
    sample: float = flag(
        1.0,
        above=0,
        at_most=1,
        help="share of the rows to take, chosen by a hash of each and --seed",
    )
    seed: int = flag(0, help="of --sample")
    workers: int = flag(
        1, at_least=1, help="processes; the output is in the same order with any number"
    )
    shard_rows: int | None = flag(
        None,
        at_least=1,
        help="write numbered files, name-00000 ..., one for each so many rows read",
    )
    resume: bool = flag(False, help="with --shard-rows: go on behind the files that are complete")

    @property
    def rules(self) -> dict[str, Rule]:
        """RULES but those of --without, with OpenCC's table of --script."""
        left_out = set(self.without or [])
        unknown = left_out - RULES.keys()
        if unknown:
            raise UserError(
                f"--without {' '.join(sorted(unknown))}: no such rule; there are {', '.join(RULES)}"
            )
        rules = {name: rule for name, rule in RULES.items() if name not in left_out}
        if "simplified" in rules:
            rules["simplified"] = partial(simplify, config=self.script)
        return rules

    @property
    def effective(self) -> dict:
        """The flags that decide what a numbered file contains."""
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in ("workers", "resume", "dropped")
        }


def refuse_contradictions(cfg: Config) -> None:
    """A UserError, before any work, for an unknown rule and for flags that do not go together."""
    _ = cfg.rules
    if cfg.dedup and cfg.shard_rows:
        raise UserError(
            "--dedup sees all rows at once: clean with --shard-rows, then "
            "python -m nanophi.text.dedup"
        )
    if cfg.dropped and (format_of(Path(cfg.dropped)) != ".jsonl" or cfg.resume):
        raise UserError(
            f"--dropped {cfg.dropped}: a .jsonl, written anew each time (so not with --resume)"
        )
    if cfg.resume and not cfg.shard_rows:
        raise UserError("--resume goes on behind complete shards: it needs --shard-rows")


# ---- 4. the command: read -> sample -> clean in processes -> write -> report


def main(cfg: Config) -> dict:
    """Clean every row of the inputs; returns the counts it prints."""
    refuse_contradictions(cfg)
    outputs = [rows_output("--out", cfg.out), rows_output("--dropped", cfg.dropped)]
    inputs = cfg.files(cfg.out, cfg.dropped)
    report = Report()
    skipped = Skipped()  # rows that could not be read
    counts = {"read": 0, "written": 0, "repeated": 0}
    # Numbered files are complete one by one, so that --resume finds them.
    at_the_end = nullcontext() if cfg.shard_rows else together()
    with claim(inputs, *outputs), at_the_end, open_dropped(cfg.dropped) as file:
        rows = sampled_rows(cfg, inputs, skipped)
        cleaned = partial(clean_in_processes, cfg=cfg, report=report, counts=counts, dropped=file)
        if cfg.shard_rows:
            written = write_numbered(cfg, rows, cleaned, inputs, counts, skipped)
        elif cfg.dedup:
            written = write_unique(cfg, refuse_none(cleaned(rows), cfg, counts, skipped), counts)
        else:
            written = write_rows(cfg.out, refuse_none(cleaned(rows), cfg, counts, skipped))
    counts["written"] = written
    counts["skipped"] = skipped.count
    counts["dropped"] = report.dropped.total()
    print(
        f"{skipped}clean: read {counts['read']:,} rows, skipped {counts['skipped']:,} bad ones, "
        f"dropped {counts['dropped']:,} and {counts['repeated']:,} repeated, "
        f"wrote {counts['written']:,} to {cfg.out}\n{report}"
    )
    return counts


def sampled_rows(cfg: Config, inputs: list[Path], skipped: Skipped) -> Iterator[dict]:
    """The rows of the inputs, or the share of them that --sample asks for."""
    with Progress("rows", None) as bar:
        for row in cfg.rows(skipped, with_texts, inputs):
            bar.update()
            if cfg.sample < 1:
                content = json.dumps(row, sort_keys=True, default=str)
                if not in_share(content, cfg.sample, str(cfg.seed)):
                    continue
            yield row


def clean_in_processes(
    rows: Iterable[dict], cfg: Config, report: Report, counts: dict[str, int], dropped: IO | None
) -> Iterator[dict]:
    """The rows that the filters keep, cleaned by --workers processes, in the order of `rows`.

    report, counts: get what happened to the rows
    dropped: the file of --dropped
    """
    work = partial(clean_rows, cfg=cfg)
    row_batches = batches(rows, BATCH, lambda row: len(text_of(row)))
    for kept, refused, part in ordered(work, row_batches, cfg.workers):
        report.add(part)
        counts["read"] += len(kept) + len(refused)
        if dropped is not None:
            write_jsonl(dropped, refused)
        yield from kept


def clean_rows(rows: list[dict], cfg: Config) -> tuple[list[dict], list[dict], Report]:
    """(cleaned rows, dropped rows with a key "why", report): the work of one process on a batch."""
    kept = []
    dropped = []
    report = Report()
    rules = cfg.rules
    for row in rows:
        cleaned = clean_row(row, report, rules)
        why = _why_dropped(row, cleaned, cfg)
        if why is None:
            kept.append(cleaned)
        else:
            report.dropped[why] += 1
            dropped.append({**row, "why": why})
    return kept, dropped, report


def _why_dropped(row: dict, cleaned: dict, limits: Limits) -> str | None:
    """Why a row is dropped: a document by the filters, a conversation if any text is empty, or if
    training would refuse it, because its speakers do not take turns.
    """
    if "text" in row:
        return why_dropped(row["text"], cleaned["text"], limits)
    texts = texts_of(cleaned)
    if not texts or not all(text.strip() for text in texts):
        return "empty"
    if is_pair(cleaned):
        return None
    try:
        check_conversation(messages_of(cleaned))
    except UserError:
        return "turns"
    return None


def refuse_none(
    rows: Iterable[dict], cfg: Config, counts: dict[str, int], skipped: Skipped
) -> Iterator[dict]:
    """The rows; a UserError if there is none. It is raised while writing, so no file appears."""
    is_empty = True
    for row in rows:
        is_empty = False
        yield row
    if is_empty:
        raise nothing_to_write(cfg, counts, skipped)


def nothing_to_write(cfg: Config, counts: dict[str, int], skipped: Skipped) -> UserError:
    bad = f"; {skipped.count:,} bad, such as {skipped.first[0]}" if skipped.count else ""
    return UserError(
        f"nothing to write to {cfg.out}: of {counts['read']:,} rows all are dropped{bad}"
    )


@contextmanager
def open_dropped(path: str | None) -> Iterator[IO | None]:
    """The file of --dropped, which appears under its name when it is complete; None without it."""
    if not path:
        yield None
        return
    with replacing(path) as beside, opened(beside, "wt", like=Path(path)) as file:
        yield file


# ---- 5. the ways to write: `write_rows` to one file, without repetitions, or numbered files


def write_unique(cfg: Config, rows: Iterable[dict], counts: dict[str, int]) -> int:
    """Write the rows that repeat no earlier one; returns how many. Adds to counts: repeated.

    Duplicates are found in two passes. So the cleaned rows go to a file without a name, which is
    read again and again: no text stays in memory.
    """
    from nanophi.text.dedup import Duplicates

    with kept_rows(rows, cfg.out) as cleaned:
        return write_rows(cfg.out, Duplicates(workers=cfg.workers).drop(cleaned, counts))


def write_numbered(
    cfg: Config,
    rows: Iterator[dict],
    cleaned: Callable[[Iterable[dict]], Iterator[dict]],
    inputs: list[Path],
    counts: dict[str, int],
    skipped: Skipped,
) -> int:
    """Write one numbered file for each --shard-rows rows read; returns how many rows were written.

    A file is made of the same number of rows read, however many of them the filters drop. So the
    number of complete files says where --resume goes on:

        --shard-rows 30, 102 rows    name-00000 of rows 0 to 29, ..., name-00003 of rows 90 to 101
        killed while it wrote the third; --resume reads past 60 rows and writes name-00002

    Files of an earlier run are replaced at the end, when all new ones are complete.
    """
    assert cfg.shard_rows is not None
    sizes = [[str(path), path.stat().st_size] for path in inputs]
    files = Numbered(cfg.out, cfg.effective | {"files": sizes}, cfg.resume)
    if files.complete:
        print(f"clean: {files.complete} complete shards of {cfg.shard_rows:,} rows each stay")
    before = files.complete
    past = before * cfg.shard_rows
    next(islice(rows, past, past), None)  # reads past the rows of the complete files
    written = files.write_groups(rows, cfg.shard_rows, cleaned)
    if not written and not before:
        files.discard()
        raise nothing_to_write(cfg, counts, skipped)
    files.publish()
    return written


if __name__ == "__main__":
    run_command(Config, main)
