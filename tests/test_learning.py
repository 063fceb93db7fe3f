"""What one learns from cannot rot: pages run, exercises fail and pass, both languages agree."""

import doctest
import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from docs import draw, pages
from exercises import exercises

ROOT = Path(__file__).resolve().parents[1]
ENGLISH = [path.name for path in pages.pages("en")]
BOTH = [path for language in pages.LANGUAGES for path in pages.pages(language)]
EXERCISES = exercises()
IN_PROCESS = [exercise for exercise in EXERCISES if not exercise.changes_library]
CHANGES = [exercise for exercise in EXERCISES if exercise.changes_library]


def name_of(exercise) -> str:
    return exercise.folder.name


# ---- the pages


def test_examples_in_docstrings_of_the_tools_are_true():
    assert doctest.testmod(pages).failed == 0


@pytest.mark.parametrize("name", ENGLISH)
def test_a_page_prints_what_it_says(name, at_small):
    pages.check_page(pages.DOCS / "en" / name)


@pytest.mark.parametrize("name", ENGLISH)
def test_the_blocks_of_a_page_can_be_pasted_into_python(name):
    """A learner's prompt answered the first `with` block with a SyntaxError: no empty line followed
    it.
    """
    page = (pages.DOCS / "en" / name).read_text(encoding="utf-8")
    codes = [block.text for block in pages.blocks_of(page) if block.language == "python"]
    faults = [fault for fault in map(pages.fault_when_pasted, codes) if fault]
    assert faults == []


def test_a_page_whose_output_is_wrong_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(6 * 7)\n```\n\n```output\n41\n```\n", encoding="utf-8")
    with pytest.raises(AssertionError, match="prints\n42"):
        pages.check_page(page)
    page.write_text(pages.with_outputs(page.read_text(encoding="utf-8"), ["42\n"]))
    pages.check_page(page)


def test_both_languages_have_the_same_pages():
    assert [path.name for path in pages.pages("zh")] == ENGLISH


@pytest.mark.parametrize("name", ENGLISH)
def test_both_languages_say_the_same(name):
    assert pages.differences(name) == []


@pytest.mark.parametrize("path", BOTH, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_links_lead_somewhere(path):
    page = pages.BLOCK.sub("", path.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", page):
        if target.startswith(("http://", "https://", "#")):
            continue
        file = (path.parent / target.split("#")[0]).resolve()
        assert file.exists(), f"{path.name} links to {target}"


# ---- the exercises


@pytest.mark.parametrize("exercise", IN_PROCESS, ids=name_of)
def test_an_exercise_fails_before(exercise, at_small):
    results = exercise.failures("stub")
    passing = [name for name, error in results.items() if error is None]
    assert results
    assert not passing, f"nothing is written yet, and {passing} pass"


@pytest.mark.parametrize("exercise", IN_PROCESS, ids=name_of)
def test_an_exercise_passes_with_its_reference(exercise, at_small):
    for name, error in exercise.failures("reference").items():
        if error is not None:
            raise AssertionError(f"{name} fails with the reference") from error


@pytest.mark.parametrize("exercise", IN_PROCESS, ids=name_of)
def test_a_stub_has_the_signatures_of_the_test(exercise):
    """Whatever the reference offers, the stub offers too."""
    stub = exercise.module("stub")
    reference = exercise.module("reference")
    for name, value in vars(stub).items():
        if inspect.isfunction(value) and value.__module__ == stub.__name__:
            assert hasattr(reference, name), f"{exercise.folder.name}: no reference for {name}"


@pytest.mark.parametrize("exercise", CHANGES, ids=name_of)
def test_a_change_of_the_library_fails_before_and_passes_after(exercise, tmp_path):
    assert any(exercise.failures("")), "there is no test"
    assert all(exercise.failures("").values()), "it passes before the change"
    for name in ("nanophi", "exercises", "examples", "data"):
        ignored = shutil.ignore_patterns("__pycache__", "my.py")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    patch = exercise.folder / "change.patch"
    command = ["git", "apply", "--unsafe-paths", f"--directory={tmp_path}", str(patch)]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=600)
    code = (
        "from exercises import exercises\n"
        f"exercise = {{e.number: e for e in exercises()}}[{exercise.number}]\n"
        "print([f'{n}: {e!r}' for n, e in exercise.failures('').items() if e is not None])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert done.stdout.strip().endswith("[]"), done.stdout + done.stderr


@pytest.mark.parametrize("exercise", EXERCISES, ids=name_of)
def test_the_text_of_an_exercise_is_there_in_both_languages(exercise):
    for name in ("README.md", "README_zh.md"):
        path = exercise.folder / name
        text = path.read_text(encoding="utf-8")
        assert text.startswith("# ")
        assert len(text) > 200
        for target in re.findall(r"\]\(([^)\s#]+)[^)]*\)", text):
            if not target.startswith("http"):
                assert (path.parent / target).resolve().exists(), f"{path} links to {target}"


# ---- the pictures


@pytest.mark.parametrize("name", draw.names())
def test_a_picture_shows_what_the_library_computes(name, at_small, tmp_path):
    shown = draw.data_in(draw.FIGURES / f"{name}.svg")
    computed = draw.data_of(name)
    assert pages.alike(json.dumps(shown), json.dumps(computed)), f"python -m docs.draw {name}"
    draw.write(name, computed, tmp_path / "picture.svg")
    assert draw.data_in(tmp_path / "picture.svg") == computed


def test_every_picture_is_shown_by_a_page():
    text = "".join(path.read_text(encoding="utf-8") for path in BOTH)
    assert [name for name in draw.names() if f"figures/{name}.svg" not in text] == []
