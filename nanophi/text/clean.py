"""Cleaning: the rules of `rules.py` until nothing changes any more, then the filters of `filters.py`, with a report.

    python -m nanophi.text.clean --input raw/ --out clean.jsonl --dedup
    python -m nanophi.text.clean --input crawl/ --out clean.jsonl.zst --workers 8 --shard-rows 100000 --resume

Rules change texts, filters drop documents. Questions, which people type without a full stop, get none:
`clean(text, final=False)`. Your own list of rules: `clean(text, rules={**RULES, "mine": str.strip})`.

Cleaning is a step of its own: the training scripts never clean.
"""

import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from nanophi.cli import Progress, UserError, flag, run_command
from nanophi.files import replacing, write_json
from nanophi.parallel import batches, ordered
from nanophi.text.corpus import (
    Reading,
    Skipped,
    numbered,
    read_rows,
    settings_of,
    shards_of,
    writable,
    write_rows,
)
from nanophi.text.filters import Limits, why_dropped
from nanophi.text.formats import format_of, opened
from nanophi.text.rules import RULES, Rule, simplify
from nanophi.text.schemas import ASKED, LEARNED, TURNS, messages_of, text_of, texts_of, with_texts
from nanophi.text.share import in_share
from nanophi.text.writers import write_jsonl

SHOWN = 16  # characters of a sample in the report
BATCH = 200_000  # characters that a process gets at once


@dataclass
class Report:
    """What each rule did (texts it changed, characters it removed, negative where it added, one sample), and what each
    filter dropped."""

    changed: Counter = field(default_factory=Counter)
    removed: Counter = field(default_factory=Counter)
    sample: dict[str, tuple[str, str]] = field(default_factory=dict)
    dropped: Counter = field(default_factory=Counter)

    def note(self, rule: str, before: str, after: str, again: bool) -> None:
        """A rule changed a text; again: it had changed this one before."""
        self.changed[rule] += not again
        self.removed[rule] += len(before) - len(after)
        if rule not in self.sample:
            start = next(
                (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b),
                len(after),
            )
            start = max(0, min(start, len(before) - 1) - 6)
            self.sample[rule] = (before[start : start + SHOWN], after[start : start + SHOWN])

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
        return "\n".join([*lines, f"  dropped: {dropped or 'none'}"])


def clean(
    text: str, final: bool = True, report: Report | None = None, rules: dict[str, Rule] = RULES
) -> str:
    """Apply the rules until they change nothing, so that clean(clean(x)) == clean(x).

    final: also the rule that ends a text in 。; for documents and answers, not for questions.
    """
    names = [name for name in rules if final or name != "final"]
    acted: set[str] = set()
    quiet = 0  # rules in a row that changed nothing; a bound, as a user's own rules may chase each other
    for name in chain.from_iterable(names for _ in range(100)):
        before, text = text, rules[name](text)
        quiet += 1
        if text != before:
            quiet = 0
            if report is not None:
                report.note(name, before, text, again=name in acted)
                acted.add(name)
        if quiet == len(names):
            break
    return text


def clean_row(row: dict, report: Report | None = None, rules: dict[str, Rule] = RULES) -> dict:
    """Clean the texts of a row of any schema; other keys stay as they are. Questions get no final punctuation."""
    cleaned = dict(row)
    for key in (*ASKED, *LEARNED):
        if key in row:
            cleaned[key] = clean(row[key], key in LEARNED, report, rules)
    for key in TURNS:
        if key in row:
            roles = [message["role"] for message in messages_of({key: row[key]})]
            cleaned[key] = []
            for turn, role in zip(row[key], roles, strict=True):
                what = "content" if "content" in turn else "value"
                cleaned[key].append(
                    turn | {what: clean(turn[what], role == "assistant", report, rules)}
                )
    return cleaned


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
        None, at_least=1, help="write name-00000 ... for each so many rows read"
    )
    resume: bool = flag(False, help="with --shard-rows: go on behind the shards that are complete")

    @property
    def rules(self) -> dict[str, Rule]:
        if unknown := set(self.without or []) - RULES.keys():
            raise UserError(
                f"--without {' '.join(sorted(unknown))}: no such rule; there are {', '.join(RULES)}"
            )
        rules = {name: rule for name, rule in RULES.items() if name not in (self.without or [])}
        return rules | (
            {"simplified": partial(simplify, config=self.script)} if "simplified" in rules else {}
        )

    @property
    def effective(self) -> dict:
        """What decides over the content of a shard."""
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in ("workers", "resume", "dropped")
        }


def clean_rows(rows: list[dict], cfg: Config) -> tuple[list[dict], list[dict], Report]:
    """(cleaned rows, dropped ones with a key "why", report): the work of one process on a batch."""
    kept, dropped, report, rules = [], [], Report(), cfg.rules
    for row in rows:
        cleaned = clean_row(row, report, rules)
        if "text" in row:
            why = why_dropped(row["text"], cleaned["text"], cfg)
        else:
            texts = texts_of(cleaned)
            why = None if texts and all(text.strip() for text in texts) else "empty"
        if why is None:
            kept.append(cleaned)
        else:
            report.dropped[why] += 1
            dropped.append({**row, "why": why})
    return kept, dropped, report


def main(cfg: Config) -> dict:
    """Clean every row of the inputs; returns the counts it prints."""
    writable(cfg.out)
    inputs = cfg.files(cfg.out, cfg.dropped)
    cfg.rules  # noqa: B018 - an unknown rule is refused before any work
    if cfg.dedup and cfg.shard_rows:
        raise UserError(
            "--dedup sees all rows at once: clean with --shard-rows, then python -m nanophi.text.dedup"
        )
    if cfg.dropped and (
        format_of(Path(cfg.dropped)) != ".jsonl" or Path(cfg.dropped) == Path(cfg.out) or cfg.resume
    ):
        raise UserError(
            f"--dropped {cfg.dropped}: a .jsonl of its own, written anew each time (so not with --resume)"
        )
    if cfg.resume and not cfg.shard_rows:
        raise UserError("--resume goes on behind complete shards: it needs --shard-rows")
    report, skipped, counts = Report(), Skipped(), {"read": 0, "written": 0, "repeated": 0}
    aside = io.StringIO()

    def taken() -> Iterator[dict]:
        with Progress("rows", None) as bar:
            for row in cfg.rows(skipped, with_texts, inputs):
                bar.update()
                if cfg.sample == 1 or in_share(
                    json.dumps(row, sort_keys=True, default=str), cfg.sample, str(cfg.seed)
                ):
                    yield row

    def cleaned(rows: Iterable[dict]) -> Iterator[dict]:
        work = partial(clean_rows, cfg=cfg)
        for kept, refused, part in ordered(
            work, batches(rows, BATCH, lambda row: len(text_of(row))), cfg.workers
        ):
            report.add(part)
            counts["read"] += len(kept) + len(refused)
            write_jsonl(aside, refused if cfg.dropped else [])
            yield from kept
        if (
            not counts["read"] - report.dropped.total() and not cfg.shard_rows
        ):  # raised here, nothing is written
            bad = f"; {skipped.count:,} bad, such as {skipped.first[0]}" if skipped.count else ""
            raise UserError(
                f"nothing to write to {cfg.out}: of {counts['read']:,} rows all are dropped{bad}"
            )

    with ExitStack() as stack:
        if cfg.dropped:
            beside = stack.enter_context(replacing(cfg.dropped))
            aside = stack.enter_context(opened(beside, "wt", like=Path(cfg.dropped)))
        if cfg.shard_rows:
            counts["written"] = _write_shards(cfg, taken(), cleaned, inputs)
        elif cfg.dedup:
            counts["written"] = _write_unique(cfg, cleaned(taken()), counts)
        else:
            counts["written"] = write_rows(cfg.out, cleaned(taken()))
    counts |= {"skipped": skipped.count, "dropped": report.dropped.total()}
    print(
        "{0}clean: read {read:,} rows, skipped {skipped:,} bad ones, dropped {dropped:,} and {repeated:,} repeated, "
        "wrote {written:,} to {1}\n{2}".format(skipped, cfg.out, report, **counts)
    )
    return counts


def _write_unique(cfg: Config, rows: Iterable[dict], counts: dict[str, int]) -> int:
    """Cleaned rows to a file beside --out, which is read again for what is new in it: no text is held in memory."""
    from nanophi.text.dedup import Again, Duplicates

    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=Path(cfg.out).parent) as folder:
        beside = Path(folder) / "cleaned.jsonl"
        write_rows(beside, rows)
        again = Again(lambda: read_rows([beside]))
        return write_rows(cfg.out, Duplicates(workers=cfg.workers).drop(again, counts))


def _write_shards(cfg: Config, rows: Iterator[dict], cleaned: Callable, inputs: list[Path]) -> int:
    """One file for each --shard-rows rows read, so that the number of complete files says where to go on."""
    settings, done = settings_of(cfg.out), 0
    now = json.loads(
        json.dumps(cfg.effective | {"files": [[str(path), path.stat().st_size] for path in inputs]})
    )
    if shards_of(cfg.out) and not settings.exists():
        raise UserError(
            f"{shards_of(cfg.out)[0]} is there, and {settings} does not say whence: name another --out"
        )
    if cfg.resume and settings.exists():
        before = json.loads(settings.read_text(encoding="utf-8"))
        if differing := [name for name in now if before.get(name) != now[name]]:
            raise UserError(
                f"--resume: {', '.join(differing)} differ from what {settings} says; leave --resume out"
            )
        while numbered(cfg.out, done).exists():
            done += 1
        print(f"clean: {done} complete shards of {cfg.shard_rows:,} rows each stay")
        next(islice(rows, done * cfg.shard_rows, done * cfg.shard_rows), None)  # reads past them
    else:
        for old in reversed(
            shards_of(cfg.out)
        ):  # what a kill leaves of them, the old settings still speak for
            old.unlink()
        write_json(settings, now)
    written = 0
    while (first := next(rows, None)) is not None:
        some = chain([first], islice(rows, cfg.shard_rows - 1))
        written += write_rows(numbered(cfg.out, done), cleaned(some))
        done += 1
    return written


if __name__ == "__main__":
    run_command(Config, main)
