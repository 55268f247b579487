"""Downloads from a server that cuts off, refuses to go on, or changes its mind."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from turboesm_cli.models import downloads
from turboesm_cli.models.downloads import download

WHOLE = bytes(range(256)) * 10_000


class Server(ThreadingHTTPServer):
    """Serves `data`; `cuts`: how many bytes each of the first answers gives before the line goes dead."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.data, self.etag, self.ranges, self.code = WHOLE, '"one"', True, 200
        self.cuts: list[int] = []
        self.asked: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/model.pt"


class Answers(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        served, asked = self.server, self.headers.get("Range")
        served.asked.append(asked)
        if served.code != 200:
            self.send_error(served.code)
            return
        start = 0
        if asked and served.ranges and self.headers.get("If-Range") == served.etag:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
        body = served.data[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(served.data) - 1}/{len(served.data)}")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", served.etag)
        self.end_headers()
        self.wfile.write(body[: served.cuts.pop(0)] if served.cuts else body)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(downloads, "WAIT", 0.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.01,))
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_cut_off_goes_on(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.cuts = [1_500_000, 100_000]
    download(server.url, tmp_path / "model.pt")
    assert (tmp_path / "model.pt").read_bytes() == WHOLE and files(tmp_path) == ["model.pt"]
    assert server.asked == [None, "bytes=1500000-", "bytes=1600000-"]
    said = capsys.readouterr().err
    assert "downloading model.pt (3 MB) to" in said and "cut off at 2 MB" in said
    assert said.index("(3 MB)") < said.index("downloading model.pt, MiB")


def test_what_an_earlier_run_left_goes_on(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "TRIES", 1)
    server.cuts = [700_000, 0]
    with pytest.raises(ConnectionError, match="700,000 of 2,560,000 bytes"):
        download(server.url, tmp_path / "model.pt")
    assert "model.pt" not in files(tmp_path)
    download(server.url, tmp_path / "model.pt")
    assert (tmp_path / "model.pt").read_bytes() == WHOLE and server.asked[-1] == "bytes=700000-"


@pytest.mark.parametrize("how", ["it refuses ranges", "it has another file"])
def test_what_cannot_go_on_begins_anew(how: str, server: Server, tmp_path: Path) -> None:
    (tmp_path / "model.pt.part").write_bytes(b"x" * 1000)
    (tmp_path / "model.pt.part.of").write_text('"one"' if how == "it refuses ranges" else '"zero"')
    server.ranges = how != "it refuses ranges"
    server.cuts = [500_000] if server.ranges else []
    download(server.url, tmp_path / "model.pt")
    assert (tmp_path / "model.pt").read_bytes() == WHOLE and server.asked[0] == "bytes=1000-"


def test_another_file_than_the_server_has_is_refused(server: Server, tmp_path: Path) -> None:
    server.etag = f'"{hashlib.md5(WHOLE + b"x").hexdigest()}"'
    with pytest.raises(ValueError, match="MD5"):
        download(server.url, tmp_path / "model.pt")
    server.etag = f'"{hashlib.md5(WHOLE).hexdigest()}"'
    download(server.url, tmp_path / "model.pt")
    assert files(tmp_path) == ["model.pt"]


def test_a_file_that_is_not_there_or_has_no_room_is_refused_at_once(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.code = 404
    with pytest.raises(OSError, match="404"):
        download(server.url, tmp_path / "model.pt")
    assert len(server.asked) == 1 and not files(tmp_path)
    server.code = 200
    monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=1))
    with pytest.raises(ValueError, match="0 MB free, and 3 MB are to come"):
        download(server.url, tmp_path / "model.pt")
