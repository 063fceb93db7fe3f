"""The glossary names things that exist: each term leads to a file that defines what it names."""

import ast
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from docs.pages import DOCS, LANGUAGES

LINK = re.compile(r"\[`([\w.]+)`\]\(([^)\s]+)\)")
HAN = re.compile("[\u4e00-\u9fff]")


@dataclass(frozen=True)
class Row:
    chinese: str
    english: str
    symbol: str  # a name, or a class and what it defines: Phi.forward
    path: Path  # the file that defines it
    sentence: str


def rows_of(language: str) -> list[Row]:
    """The rows of the one table of docs/<language>/glossary.md."""
    page = DOCS / language / "glossary.md"
    lines = [line for line in page.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    rows = []
    for line in lines[2:]:  # behind the heading and the rule
        chinese, english, where, sentence = (cell.strip() for cell in line.strip("|").split("|"))
        link = LINK.fullmatch(where)
        assert link, f"{page.name} in {language}: {where} is no link such as [`name`](file.py)"
        symbol, target = link.groups()
        rows.append(Row(chinese, english, symbol, (page.parent / target).resolve(), sentence))
    return rows


def names_in(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """What the statements of a module or class define: functions, classes, variables, fields."""
    found: dict[str, ast.stmt] = {}
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            found[statement.name] = statement
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            several = isinstance(statement, ast.Assign)
            for target in statement.targets if several else [statement.target]:
                if isinstance(target, ast.Name):
                    found[target.id] = statement
    return found


def defines(source: str, symbol: str) -> bool:
    """Whether the source of a module defines a name, dotted for what a class defines."""
    body = ast.parse(source).body
    for name in symbol.split("."):
        statement = names_in(body).get(name)
        if statement is None:
            return False
        body = statement.body if isinstance(statement, ast.ClassDef) else []
    return True


ROWS = {language: rows_of(language) for language in LANGUAGES}


def test_a_name_is_found_where_it_is_defined_and_nowhere_else():
    source = "A = 1\nclass B:\n    c: int\n    def d(self): e = 2\ndef f(): ...\nfrom g import h\n"
    assert all(defines(source, symbol) for symbol in ("A", "B", "B.c", "B.d", "f"))
    assert not any(defines(source, symbol) for symbol in ("c", "B.A", "B.d.e", "e", "f.A", "h"))


@pytest.mark.parametrize("row", ROWS["en"], ids=lambda row: row.english)
def test_the_file_defines_what_is_named(row):
    assert row.path.is_relative_to(DOCS.parent)
    assert row.path.exists(), f"{row.english}: there is no {row.path}"
    assert defines(row.path.read_text(encoding="utf-8"), row.symbol), (
        f"{row.english}: {row.path.name} does not define {row.symbol}"
    )


def test_both_languages_have_the_same_terms_and_names():
    english, chinese = (
        [(row.chinese, row.english, row.symbol, row.path) for row in ROWS[language]]
        for language in LANGUAGES
    )
    assert english == chinese
    assert len(english) >= 45


@pytest.mark.parametrize("column", ["chinese", "english"])
def test_no_term_stands_twice(column):
    terms = [getattr(row, column).casefold() for row in ROWS["en"]]
    assert sorted({term for term in terms if terms.count(term) > 1}) == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_each_term_is_explained_in_the_language_of_the_page(language):
    for row in ROWS[language]:
        assert row.sentence.endswith("." if language == "en" else "。"), row.sentence
        assert bool(HAN.search(row.sentence)) == (language == "zh"), row.sentence
