"""The model card: what the files of a run say, in the form that model hubs read."""

import json
from xml.etree import ElementTree

import pytest

import nanophi
from nanophi.cli import UserError
from nanophi.model import card
from tests.conftest import tiny_model


def run_dir(path, tok, lines=(), **config):
    model = tiny_model()
    model.set_vocabulary(len(tok))
    nanophi.save(path, model, tok)
    saved = {"config": {"lr": 0.01, "seed": 0, **config}, "versions": {"nanophi": "0.1.0"}}
    (path / "run.json").write_text(json.dumps(saved))
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


LINES = [
    {"step": 1, "loss": 6.0},
    {"step": 2, "loss": float("nan")},
    {"step": 3, "loss": 4.0, "val_loss": 4.5},
]


def write(path, **settings) -> str:
    card.main(card.Config(model=str(path), **settings))
    return (path / "README.md").read_text(encoding="utf-8")


def test_the_card_tells_the_whole_way(tok, tmp_path):
    first = run_dir(tmp_path / "pre", tok, LINES, preset="demo", data="/srv/me/tokens")
    run_dir(
        tmp_path / "sft", tok, LINES[:1], learn="all", init_from=str(first), data=["a.jsonl", "b"],
        compile=True, shard=False, template=None,
    )  # fmt: skip
    (tmp_path / "sft" / "evaluation.md").write_text("# Evaluation\n\n## Bits per byte\n\n2.5\n")
    text = write(tmp_path / "sft", name="me/phi", data="my diary", license="cc-by-4.0")
    assert text.startswith("---\nlanguage: zh\nlicense: cc-by-4.0\n")
    assert "# me/phi\n" in text
    assert "my diary" in text
    assert "python pretrain.py --lr 0.01 --seed 0 --preset demo --data tokens\n" in text
    assert "/srv/me" not in text
    command = "python sft.py --lr 0.01 --seed 0 --learn all --init-from pre --data a.jsonl b "
    assert f"{command}--compile\n" in text
    assert "## Evaluation\n\n### Bits per byte\n\n2.5" in text
    assert "![the losses" in text


def test_the_curve_is_a_picture_of_all_runs(tok, tmp_path):
    run_dir(tmp_path, tok, LINES, preset="demo")
    write(tmp_path)
    picture = ElementTree.parse(tmp_path / card.CURVE).getroot()
    kinds = [element.tag.split("}")[1] for element in picture]
    assert kinds.count("polyline") == 1
    assert kinds.count("circle") == 1  # one loss of held-out text
    (line,) = picture.iter("{http://www.w3.org/2000/svg}polyline")
    assert len(line.get("points").split()) == 2  # nan has no place


def test_a_directory_without_a_run_has_a_card_too(tok, tmp_path):
    model = tiny_model()
    model.set_vocabulary(len(tok))
    nanophi.save(tmp_path, model, tok)
    text = write(tmp_path)
    assert "no run.json" in text
    assert "None yet." in text
    assert not (tmp_path / card.CURVE).exists()


def test_a_card_is_written_anew_but_no_readme_of_others_is_lost(tok, tmp_path):
    run_dir(tmp_path, tok, LINES)
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(UserError, match="--overwrite"):
        write(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    write(tmp_path, overwrite=True)
    assert "second" in write(tmp_path, name="second")


def test_runs_that_name_each_other_end(tok, tmp_path):
    run_dir(tmp_path / "a", tok, LINES, init_from=str(tmp_path / "b"))
    run_dir(tmp_path / "b", tok, LINES, init_from=str(tmp_path / "a"))
    assert len(card.runs_of(tmp_path / "a")) == 2


@pytest.mark.parametrize("saved", [[], {"config": 3}, {}])
def test_a_run_of_another_form_is_named(tok, tmp_path, saved):
    run_dir(tmp_path, tok)
    (tmp_path / "run.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match=r"run\.json holds no settings"):
        write(tmp_path)
