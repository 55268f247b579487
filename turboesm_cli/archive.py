"""One file of named parts: an uncompressed zip with a JSON manifest that holds each part's size and sha256.

    manifest.json      {"format": KIND, "format_version": 1, "tool_version": ..., ..., "parts": {name: {...}}}
    NAME.safetensors   tensors, no pickle

Readers refuse: another kind or a later version; parts that are missing, unlisted, compressed, named twice or
with a path; sizes and hashes that differ from the manifest. The same content gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from turboesm_cli import __version__
from turboesm_cli.errors import BundleError
from turboesm_cli.files import atomic_output

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MANIFEST_LIMIT = 64 << 20
PART_LIMIT = 16 << 30
TEXT_LIMIT = 300


def write_archive(
    path: Path, kind: str, manifest: dict[str, Any], parts: Iterable[tuple[str, dict[str, Tensor]]]
) -> None:
    """Write parts one by one, then the manifest; the file appears whole or not at all. Raises OutputError."""
    listed: dict[str, dict[str, Any]] = {}
    with atomic_output(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        for name, tensors in parts:
            data = safetensors.torch.save({key: tensor.cpu().contiguous() for key, tensor in tensors.items()})
            listed[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            archive.writestr(_entry(name), data)
        head = {"format": kind, "format_version": FORMAT_VERSION, "tool_version": __version__}
        archive.writestr(_entry(MANIFEST), json.dumps(head | manifest | {"parts": listed}, indent=1))


def kind_of(path: Path) -> str:
    """What kind of archive a file says to be, "" where it does not say. Raises BundleError for other files."""
    with _opened(path, "turboesm") as archive:
        try:
            manifest = _manifest(archive)
        except (*_UNREADABLE, KeyError, ValueError):
            return ""
    return str(manifest.get("format", "")) if isinstance(manifest, dict) else ""


class Archive:
    """An archive opened for reading; use it as a context manager. Raises BundleError for what is wrong with it."""

    def __init__(self, path: Path, kind: str) -> None:
        self._path = Path(path)
        self._zip = _opened(self._path, kind)
        try:
            self.manifest = self._read_manifest(kind)
            self._check_parts()
        except BaseException:
            self._zip.close()
            raise

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()

    @property
    def parts(self) -> Iterator[str]:
        """Names of the parts, in the order in which they were written."""
        return iter(self.manifest["parts"])

    def read(self, name: str) -> dict[str, Tensor]:
        """A part's tensors, its size and hash checked first."""
        listed = self.manifest["parts"][name]
        try:
            data = self._zip.read(name)
        except _UNREADABLE as error:
            raise self._broken(f"part {name} cannot be read ({error})") from error
        if hashlib.sha256(data).hexdigest() != listed["sha256"]:
            raise self._broken(f"part {name} differs from its sha256")
        try:
            return dict(safetensors.torch.load(data))
        except safetensors.SafetensorError as error:
            raise self._broken(f"part {name} holds no tensors ({error})") from error

    def _read_manifest(self, kind: str) -> dict[str, Any]:
        try:
            manifest = _manifest(self._zip)
        except (*_UNREADABLE, KeyError, ValueError) as error:
            raise self._broken(f"no readable {MANIFEST} ({error})") from error
        if not isinstance(manifest, dict) or manifest.get("format") != kind:
            found = manifest.get("format") if isinstance(manifest, dict) else None
            raise BundleError(f"{self._path} is a {found or 'foreign'} file, not a {kind}; name another file")
        version = manifest.get("format_version")
        if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
            raise BundleError(
                f"{self._path} has format version {version}, turboesm {__version__} reads up to {FORMAT_VERSION}; "
                "upgrade turboesm"
            )
        return manifest

    def _check_parts(self) -> None:
        listed = self.manifest.get("parts")
        entries = {entry.filename: entry for entry in self._zip.infolist()}
        if not isinstance(listed, dict) or len(entries) != len(self._zip.infolist()):
            raise self._broken("the list of parts is missing or a part is there twice")
        if set(entries) != {*listed, MANIFEST}:
            raise self._broken("the parts are not those that the manifest lists")
        for name, described in listed.items():
            entry = entries[name]
            if (
                not name.isprintable()
                or Path(name).is_absolute()
                or ".." in Path(name).parts
                or entry.compress_type != zipfile.ZIP_STORED
            ):
                raise self._broken(f"part {name!r} has an unsafe name or is compressed")
            size = described.get("bytes") if isinstance(described, dict) else None
            if entry.file_size != size or entry.file_size > PART_LIMIT or "sha256" not in described:
                raise self._broken(f"part {name} has {entry.file_size:,} bytes, the manifest says {size}")

    def _broken(self, reason: str) -> BundleError:
        return BundleError(f"{self._path} is damaged: {reason}; make it again")


def printable(value: object) -> str:
    """A short text that is safe to show, such as a name. Raises ValueError for anything else."""
    if not isinstance(value, str) or len(value) > TEXT_LIMIT or not value.isprintable():
        raise ValueError(f"{str(value)[:40]!r} is no short printable text")
    return value


_UNREADABLE = (OSError, zipfile.BadZipFile, EOFError, RuntimeError, NotImplementedError)
"""What reading a member raises where it is damaged, encrypted or compressed in an unknown way."""


def _opened(path: Path, kind: str) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except FileNotFoundError as error:
        raise BundleError(f"no file {path}; check the path") from error
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
        raise BundleError(f"{path} is no {kind} file or was cut off ({error}); make it again") from error


def _manifest(archive: zipfile.ZipFile) -> Any:
    """The manifest, its size checked first; no NaN. Raises KeyError, ValueError and what `_UNREADABLE` lists."""
    entry = archive.getinfo(MANIFEST)
    if entry.file_size > MANIFEST_LIMIT or entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"compressed or over {MANIFEST_LIMIT:,} bytes")
    return json.loads(archive.read(entry), parse_constant=_no_number)


def _no_number(text: str) -> None:
    raise ValueError(f"{text} in {MANIFEST}")


def _entry(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(name)  # the epoch of zip: equal content, equal bytes
