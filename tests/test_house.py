"""The house keeps its floors: who may import whom, what an import may do."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nanophi

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "nanophi"
GROUND = {
    f"nanophi.{name}"
    for name in ("chinese", "claims", "cli", "columns", "expect", "files", "lazy", "parallel")
}
MAY_IMPORT = {
    "tokenizer": {"tokenizer"},
    "text": {"tokenizer", "text"},
    "model": {"model"},
    "train": {"tokenizer", "text", "model", "train"},
    "infer": {"tokenizer", "text", "model", "infer"},
}
EXCEPTIONS = {
    ("model/checkpoint.py", "nanophi.tokenizer.tokenizer"),  # a checkpoint carries its tokenizer
    ("model/checkpoint.py", "nanophi.tokenizer.template"),  # and the form of its conversations
    ("model/card.py", "nanophi.tokenizer.tokenizer"),  # and a card says what that is
    ("infer/evaluate.py", "nanophi.train.losses"),
    ("train/loop.py", "nanophi"),  # its __version__, for run.json
}
SCRIPTS = {"train_tokenizer", "pretrain", "sft", "dpo", "generate"}


def imports_of(source: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute, so that a reader sees the floor"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            here = {
                name
                for name in names
                if (ROOT / name.replace(".", "/")).with_suffix(".py").exists()
            }
            here |= {name for name in names if (ROOT / name.replace(".", "/")).is_dir()}
            found |= here or {node.module}
    return found


def upward(path: str, source: str) -> set[str]:
    """The imports of a package file that climb to a higher floor, or to a script."""
    if path == "__init__.py":
        return set()  # the door: it names what every room has, and imports it on first use
    room = path.split("/")[0]
    bad = set()
    for name in imports_of(source):
        parts = name.split(".")
        if parts[0] in SCRIPTS:
            bad.add(name)
        elif parts[0] == "nanophi" and name not in GROUND and (path, name) not in EXCEPTIONS:
            # Files on the ground import nothing of ours above them.
            allowed = MAY_IMPORT.get(room, set())
            if len(parts) < 2 or parts[1] not in allowed:
                bad.add(name)
    return bad


@pytest.mark.parametrize(
    "path", [str(p.relative_to(PACKAGE)) for p in sorted(PACKAGE.rglob("*.py"))]
)
def test_imports_go_down(path):
    assert upward(path, (PACKAGE / path).read_text(encoding="utf-8")) == set()


def test_the_floor_test_can_fail():
    assert upward("text/x.py", "from nanophi.model.phi import Phi") == {"nanophi.model.phi"}
    assert upward("model/phi.py", "import nanophi.tokenizer.tokenizer") == {
        "nanophi.tokenizer.tokenizer"
    }
    assert upward("train/x.py", "def f():\n    from nanophi.infer import generate") == {
        "nanophi.infer.generate"
    }
    assert upward("infer/x.py", "import pretrain") == {"pretrain"}
    assert upward("text/x.py", "from nanophi import Phi") == {
        "nanophi"
    }  # the root re-exports every room
    assert upward("text/x.py", "from nanophi import train") == {"nanophi.train"}
    assert upward("cli.py", "from nanophi.text.clean import clean") == {"nanophi.text.clean"}


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.strip()


def test_import_nanophi_is_light():
    heavy = ("torch", "numpy", "opencc", "regex")
    code = f"import sys, nanophi; print([name for name in {heavy} if name in sys.modules])"
    assert run_python(code) == "[]"


def test_model_and_loop_need_only_torch_numpy_safetensors():
    """A GPU image often has nothing else; opencc, sentencepiece, regex and tqdm are imported where
    they are used.
    """
    code = (
        "import sys\n"
        "for name in ('opencc', 'sentencepiece', 'regex', 'tqdm', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"
        "import nanophi.train.loop, nanophi.infer.generate\n"
        "import nanophi.text.clean, nanophi.tokenizer.bpe\n"
        "print('imported')"
    )
    assert run_python(code) == "imported"


def test_public_names_exist_and_unknown_ones_are_errors():
    for name in nanophi.__all__:
        assert getattr(nanophi, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Pih'"):
        _ = nanophi.Pih


def test_every_room_is_installed():
    """find_packages once missed a room without __init__.py: the checkout worked, an installed copy
    did not.
    """
    rooms = {p.name for p in PACKAGE.iterdir() if p.is_dir() and not p.name.startswith("__")}
    assert all((PACKAGE / room / "__init__.py").exists() for room in rooms)
    assert rooms == {"tokenizer", "text", "model", "train", "infer"}


@pytest.mark.parametrize("name_of_readme", ["README.md", "README_zh.md"])
def test_readme_tells_presets_as_they_are(name_of_readme):
    from nanophi.model.config import PRESETS, PhiConfig
    from nanophi.model.phi import Phi

    readme = (ROOT / name_of_readme).read_text(encoding="utf-8")
    for name in PRESETS:
        cfg = PhiConfig.preset(name)
        with torch.device("meta"):
            parameters = sum(p.numel() for p in Phi(cfg).parameters())
        numbers = (cfg.hidden_size, cfg.num_attention_heads, cfg.num_hidden_layers)
        shape = ", ".join(map(str, (*numbers, cfg.intermediate_size)))
        assert f"| `{name}` | {shape} | {cfg.vocab_size:,} | {parameters:,} |" in readme


FILES = ["docs/en/files.md", "docs/zh/files.md"]


@pytest.mark.parametrize("page", FILES)
def test_the_table_of_files_is_complete(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for path in PACKAGE.rglob("*.py"):
        if path.name != "__init__.py":
            assert f"`{path.name}`" in text, f"{page} lacks {path.name}"


@pytest.mark.parametrize("name_of_readme", ["README.md", "README_zh.md"])
def test_links_of_the_readmes_lead_somewhere(name_of_readme):
    text = (ROOT / name_of_readme).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), f"{name_of_readme} links to {target}"


def test_nothing_of_this_machine_is_in_the_repository():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    pattern = re.compile(r"(?<![\w.])/(home|root|work|mnt)/\w")
    for name in tracked:
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".txt") and path.exists():
            assert not pattern.search(path.read_text(encoding="utf-8")), name


TOUR_ROW = re.compile(r"\| \d+ \| \[`(?P<file>[^`]+)`\]\([^)]*\) \| (?P<read>[^|]*) \|")
BEGIN = re.compile(r"(?:from|从) `([^`]+)`")
END = re.compile(r"(?:to|到) `([^`]+)`")


def lines_to_read(file: str, read: str) -> int:
    """The lines of one row of the reading tour; a name in it must stand in the file."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    begin = BEGIN.search(read)
    end = END.search(read)

    def place(name: str) -> int:
        """The line of a heading or of a definition."""
        starts = name if name.startswith("def ") else f"# ---- {name}"
        return next(i for i, line in enumerate(lines) if line.strip().startswith(starts))

    first = place(begin[1]) if begin else 0
    last = place(end[1]) if end else len(lines)
    assert first < last
    return last - first


@pytest.mark.parametrize("page", FILES)
def test_the_reading_tour_names_what_is_there(page):
    rows = TOUR_ROW.finditer((ROOT / page).read_text(encoding="utf-8"))
    tour = [lines_to_read(row["file"], row["read"]) for row in rows]
    assert len(tour) == 12
    assert min(tour) > 20
