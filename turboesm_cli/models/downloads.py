"""Files from the network: their size is told first; what was cut off goes on where it stopped.

A file is written beside its place as NAME.part and put there when it is whole. NAME.part.of holds what the server
calls the version (ETag or date), so that a file that changed meanwhile is begun anew. Hugging Face's hub has a
client of its own, which does the same; see `hugging_face`.
"""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO

from turboesm_cli import console

TRIES = 5
"""Times in a row that nothing comes before it is given up."""
WAIT = 1.0
"""Seconds between tries."""
TIMEOUT = 30.0
CHUNK = MIB = 1 << 20

FAILURES = (OSError, ValueError, http.client.HTTPException)
"""What `download` raises."""


def download(url: str, path: Path) -> None:
    """Put what is at `url` to `path`; another process that does the same is waited for. Raises `FAILURES`."""
    part = path.with_name(f"{path.name}.part")
    with part.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.say(f"waiting for another process that downloads {path.name}")
            fcntl.flock(file, fcntl.LOCK_EX)
        if path.exists():  # the other one has done it
            part.unlink(missing_ok=True)
            return
        try:
            _fill(url, path, file)
        except BaseException:
            if not file.tell():
                part.unlink()
            raise
        file.flush()
        os.fsync(file.fileno())
        part.replace(path)
    _version_of(path).unlink(missing_ok=True)


def _version_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.part.of")


def _fill(url: str, path: Path, file: IO[bytes]) -> None:
    """Append what is still missing, in as many goes as it takes."""
    failed, start = 0, file.tell()
    while True:
        before = file.tell()
        try:
            _go_on(url, path, file)
            return
        except urllib.error.HTTPError as error:
            if error.code == 416:  # what is there is no beginning of the file
                _empty(file)
            elif error.code not in (408, 429) and error.code < 500:
                raise
            reason: Exception = error
        except (ValueError, PermissionError):
            raise
        except FAILURES as error:
            if getattr(error, "errno", None) is not None and not isinstance(error, ConnectionError | TimeoutError):
                raise  # the disk's
            reason = error
        failed = 0 if file.tell() > before else failed + 1
        if failed == TRIES or file.tell() == start == before:  # or nothing has come at all
            raise reason
        console.say(f"{path.name} was cut off at {size_text(file.tell())} ({reason}); going on")
        time.sleep(WAIT)


def _go_on(url: str, path: Path, file: IO[bytes]) -> None:
    """One request, for what is missing; raises ConnectionError where less came."""
    have, known = file.seek(0, os.SEEK_END), _version_of(path)
    version = known.read_text() if have and known.exists() else ""
    headers = {"User-Agent": "turboesm"}
    if have and version:
        headers |= {"Range": f"bytes={have}-", "If-Range": version}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as response:
        goes_on = response.status == 206 and _first_byte(response.headers.get("Content-Range", "")) == have
        if not goes_on:  # it has changed, or the server gives it as a whole only
            have = 0
            _empty(file)
        left = response.headers.get("Content-Length")
        total = have + int(left) if left is not None else None
        version = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
        known.write_text("" if version.startswith("W/") else version)
        _check_room(path, total, have)
        of = f"{size_text(total)}" if total is not None else "a size that the server does not say"
        rest = f", of which {size_text(have)} are there" if have else ""
        console.say(f"downloading {path.name} ({of}{rest}) to {path.parent}")
        with console.progress(f"downloading {path.name}, MiB", ((total or 0) - have) // MIB) as tick:
            told = 0
            while chunk := response.read(CHUNK):
                file.write(chunk)
                came = file.tell() - have
                tick(came // MIB - told)
                told = came // MIB
        if total is not None and file.tell() != total:
            raise ConnectionError(f"{file.tell():,} of {total:,} bytes")
        _check_digest(path, file, version)


def _empty(file: IO[bytes]) -> None:
    file.truncate(0)
    file.seek(0)


def _first_byte(content_range: str) -> int | None:
    found = re.match(r"bytes (\d+)-", content_range)
    return int(found[1]) if found else None


def _check_room(path: Path, total: int | None, have: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if total is not None and total - have > free:
        raise ValueError(f"{path.parent} has {size_text(free)} free, and {size_text(total - have)} are to come")


def _check_digest(path: Path, file: IO[bytes], version: str) -> None:
    """Raise ValueError where the server says an MD5, as S3 does of what came in one piece, and it differs."""
    said = re.fullmatch(r'"([0-9a-f]{32})"', version)
    if said is None:
        return
    file.flush()
    with Path(file.name).open("rb") as written:
        found = hashlib.file_digest(written, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != said[1]:
        _empty(file)
        raise ValueError(f"{path.name} has MD5 {found}, and the server says {said[1]}: run again")


def size_text(nbytes: int) -> str:
    """`2.6 GB`, `31 MB`."""
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:,.0f} MB"
