"""Cleaning: named rules, each str -> str, applied in the order of RULES until nothing changes any more.

    python -m nanophi.text.clean --input raw/ --out clean.jsonl --dedup

What the rules must not do is half of their job: Chinese punctuation, decimals, URLs, code and Latin words stay as they
are (the original turned `4.567Ga` into `4。567Ga` and deleted every letter s that stood twice). Questions, which people
type without a full stop, get none: `clean(text, final=False)`.

Cleaning is a step of its own: the training scripts never clean.
"""

import hashlib
import html
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from pathlib import Path

from nanophi.cli import Progress, UserError, flag, run
from nanophi.text.corpus import Skipped, expand, read_rows, refuse, write_rows
from nanophi.text.formats import SampleBy, format_of
from nanophi.text.rows import ASKED, LEARNED, TURNS, messages_of, text_of, texts_of, with_texts

HAN = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff〇"

TAG_NAMES = (
    "p|br|div|span|a|b|i|u|em|strong|h[1-6]|ul|ol|li|table|tbody|thead|tr|td|th|img|font|center|hr|sup|sub|blockquote"
)
# Attributes need a value: `a <b and c> d` is no tag; nor is one letter right behind a word: List<a> is code.
TAG = re.compile(
    rf"""<(?!(?<=\w<)[abiup]>)(/?)({TAG_NAMES})((?:\s+[\w:-]+\s*=\s*(?:"[^"<>]*"|'[^'<>]*'|[^\s"'<>]+))*)\s*/?>""", re.I
)
COMMENT = re.compile(r"<!--.*?-->", re.S)
CODE = re.compile(r"(```.*?```|`[^`\n]+`)", re.S)  # Markdown's code shows tags as text
ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")  # with `;`: not in `?a=1&copy=2`
BREAKING_TAGS = ("p", "br", "div", "li", "tr", "h1", "h2", "h3", "h4", "h5", "h6", "hr")


def strip_html(text: str) -> str:
    """Entities become characters, to the bottom of `&amp;lt;`; comments and well-known tags go. Markdown code stays,
    and so does any other `<...>`: it is code or mathematics."""
    parts = CODE.split(text)
    return "".join(part if i % 2 else _strip_html(part) for i, part in enumerate(parts))


def _strip_html(text: str) -> str:
    before = None
    while text != before:  # each replacement shortens the text
        before = text
        text = ENTITY.sub(lambda m: html.unescape(m[0]), COMMENT.sub("", text))
    return TAG.sub(lambda m: "\n" if m[2].lower() in BREAKING_TAGS else "", text)


INVISIBLE = re.compile(
    # Controls but \t and \n; zero-width and directional marks; half surrogate pairs. U+200D stays: it joins emoji.
    r"[\ud800-\udfff\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u200b\u200c\u200e\u200f\u202a-\u202e\u2060-\u2064\ufeff\ufffe\uffff]"
)


def drop_invisible(text: str) -> str:
    """Remove characters one cannot see; every kind of line break becomes \\n."""
    return INVISIBLE.sub("", re.sub(r"\r\n?|\x0b|\x0c|\x85|\u2028|\u2029", "\n", text))


# NFKC would make most of these ASCII (，->, …->...), lose a power, an index or a unit (m² -> m2, ㎡ -> m2, ② -> 2), run
# a fraction into the number before it (5½ -> 51⁄2), or tear a lone accent or a double prime apart.
KEPT_BY_NFKC = re.compile(r"[，。？！：；（）…～²³¹⁰-₟¼-¾⅐-⅟↉″‴⁗ªº´¨¯¸①-⓿㈀-㋿㌀-㏿]+")


def nfkc(text: str) -> str:
    """Unicode NFKC (full-width letters and digits become ordinary ones), Chinese punctuation and units excepted."""
    parts, end = [], 0
    for kept in KEPT_BY_NFKC.finditer(text):
        parts += [unicodedata.normalize("NFKC", text[end : kept.start()]), kept[0]]
        end = kept.end()
    return "".join(parts) + unicodedata.normalize("NFKC", text[end:])


@cache
def _opencc():
    import opencc

    return opencc.OpenCC("t2s")


def simplify(text: str) -> str:
    """Traditional -> simplified characters, by OpenCC's phrase tables.

    薴 stays: OpenCC makes it 苧, which it would make 苎, another plant, the next time.
    """
    return "薴".join(_opencc().convert(part) for part in text.split("薴"))


# Not `.` (1.000, ...), not + - * = # / (C++, --, ==); ASCII ! or ? only after Han, or three behind a word: `!!x` is
# code, and a line may begin with `???` or `!!!` as Markdown.
REPEATED = re.compile(rf"([，。？！：；、～])\1+|(…)…{{2,}}|(—)—{{2,}}|(?<=[{HAN}])([!?])\4+|(?<=\S)([!?])\5{{2,}}")


def collapse_punctuation(text: str) -> str:
    """`。。。。` -> `。`, `!!!!` -> `!`; the ellipsis `……` and the dash `——` are two characters each and stay so."""

    def once(match: re.Match) -> str:
        return match[2] * 2 if match[2] else match[3] * 2 if match[3] else match[0][0]

    return REPEATED.sub(once, text)


def tidy_space(text: str) -> str:
    """Trim the text and its lines' ends, at most one blank line, no ideographic indentation (code keeps its own), one
    space at most between Han."""
    text = re.sub(r"[^\S\n]+$", "", text, flags=re.M)
    text = re.sub(rf"^[^\S\n]*\u3000[^\S\n]*|\A\s+(?=[{HAN}])", "", text, flags=re.M)
    text = re.sub(rf"(?<=[{HAN}，。？！：；])[^\S\n]{{2,}}(?=[{HAN}])", " ", text)
    return re.sub(r"\n{3,}", "\n\n", text).lstrip("\n").rstrip()


def final_punctuation(text: str) -> str:
    """A text that ends in Han, or in a closing bracket right after Han, gets its 。; anything else ends as it is."""
    return re.sub(rf"(?<=[{HAN}])([”’）》】」』)\]]?)\Z", r"\1。", text)


Rule = Callable[[str], str]
RULES: dict[str, Rule] = {
    "html": strip_html,
    "invisible": drop_invisible,
    "space": tidy_space,  # before NFKC, which makes ideographic spaces ordinary ones
    "nfkc": nfkc,
    "simplified": simplify,
    "punctuation": collapse_punctuation,
}
FINAL_RULE: dict[str, Rule] = {"final": final_punctuation}


@dataclass
class Report:
    """What each rule did: documents it changed, characters it removed (negative: added), and one sample."""

    changed: Counter = field(default_factory=Counter)
    removed: Counter = field(default_factory=Counter)
    sample: dict[str, tuple[str, str]] = field(default_factory=dict)

    def note(self, rule: str, before: str, after: str, again: bool) -> None:
        """A rule changed a text; again: it had changed this one before."""
        self.changed[rule] += not again
        self.removed[rule] += len(before) - len(after)
        if rule not in self.sample:
            start = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(after))
            start = max(0, min(start, len(before) - 1) - 6)
            self.sample[rule] = (before[start : start + 16], after[start : start + 16])

    def __str__(self) -> str:
        lines = [f"  {'rule':12} {'texts':>7} {'characters':>11}   sample"]
        for rule in [*RULES, *FINAL_RULE]:
            before, after = self.sample.get(rule, ("", ""))
            sample = f"{before!r} -> {after!r}" if before else ""
            lines.append(f"  {rule:12} {self.changed[rule]:>7,} {-self.removed[rule]:>+11,}   {sample}")
        return "\n".join(lines)


def clean(text: str, final: bool = True, report: Report | None = None) -> str:
    """Apply the rules until they change nothing, so that clean(clean(x)) == clean(x).

    final: also the rule that ends a text in 。; for documents and answers, not for questions.
    """
    rules = RULES | (FINAL_RULE if final else {})
    acted: set[str] = set()
    for _ in range(100):  # seldom more than two rounds: the second only confirms
        start = text
        for name, rule in rules.items():
            before, text = text, rule(text)
            if report is not None and text != before:
                report.note(name, before, text, again=name in acted)
                acted.add(name)
        if text == start:
            break
    return text


def clean_row(row: dict, report: Report | None = None) -> dict:
    """Clean the texts of a row of any schema; other keys stay as they are. Questions get no final punctuation."""
    cleaned = dict(row)
    for key in (*ASKED, *LEARNED):
        if key in row:
            cleaned[key] = clean(row[key], key in LEARNED, report)
    for key in TURNS:
        if key in row:
            cleaned[key] = [
                {"role": turn["role"], "content": clean(turn["content"], turn["role"] == "assistant", report)}
                for turn in messages_of({key: row[key]})
            ]
    return cleaned


@dataclass(kw_only=True)
class Config:
    input: list[str] = flag(help="files, directories or globs: .jsonl .json .txt, plain or .gz or .xz")
    out: str = flag(help="the .jsonl to write (.jsonl.xz and .gz too)")
    dedup: bool = flag(False, help="drop repeated and nearly repeated rows (character 5-grams, Jaccard 0.8)")
    sample: float = flag(
        1.0, above=0, at_most=1, help="share of the rows to take, chosen by a hash of each row and --seed"
    )
    seed: int = flag(0, help="of --sample")
    sample_by: SampleBy = flag("line", help="what is a document in a .txt file")
    strict: bool = flag(False, help="stop at a bad row (no JSON, no UTF-8, no known keys) instead of skipping it")


def sampled(row: dict, share: float, seed: int) -> bool:
    """Whether a row is in the sample: depends on its content and the seed, not on its place."""
    digest = hashlib.blake2b(f"{seed}{json.dumps(row, sort_keys=True)}".encode(), digest_size=8).digest()
    return share >= 1 or int.from_bytes(digest, "little") < share * 2**64


def main(cfg: Config) -> dict:
    """Clean every row of the inputs; returns the counts it prints. With --dedup all rows are held in memory."""
    from nanophi.text.dedup import near_duplicates

    out = Path(cfg.out)
    if format_of(out) != ".jsonl" or out.is_dir():
        raise UserError(f"--out {cfg.out}: rows are written as .jsonl (or .jsonl.gz, .jsonl.xz), so name such a file")
    inputs = [path for path in expand(cfg.input) if path.resolve() != out.resolve()]  # not yesterday's output
    if not inputs:
        raise UserError(f"--out {cfg.out} is the only input: it would overwrite what it reads")
    report, skipped, counts = Report(), Skipped(), {"read": 0, "empty": 0, "repeated": 0}

    def cleaned_rows() -> Iterator[dict]:
        with Progress("rows", None) as bar:
            for row in read_rows(inputs, cfg.sample_by, with_texts, refuse if cfg.strict else skipped):
                bar.update()
                if not sampled(row, cfg.sample, cfg.seed):
                    continue
                counts["read"] += 1
                cleaned = clean_row(row, report)
                if all(text.strip() for text in texts_of(cleaned)):
                    yield cleaned
                else:
                    counts["empty"] += 1

    rows = cleaned_rows()
    if cfg.dedup:
        kept = list(rows)
        repeated = set(near_duplicates(map(text_of, kept)))
        counts["repeated"] = len(repeated)
        rows = (row for i, row in enumerate(kept) if i not in repeated)
    first = next(rows, None)
    if first is None:
        bad = f"; {skipped.count:,} bad, such as {skipped.first[0]}" if skipped.count else ""
        raise UserError(f"nothing to write to {out}: of {counts['read']:,} rows {counts['empty']:,} are empty{bad}")
    counts["written"] = write_rows(out, chain([first], rows))
    counts["skipped"] = skipped.count
    print(
        "clean: read {read:,} rows, skipped {skipped:,} bad ones, dropped {empty:,} empty and {repeated:,} repeated, "
        "wrote {written:,}".format(**counts)
        + f" to {out}\n{skipped}{report}"
    )
    return counts


if __name__ == "__main__":
    run(Config, main)
