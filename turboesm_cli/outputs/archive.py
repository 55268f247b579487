"""One file of named parts: an uncompressed zip with a JSON manifest that holds each part's size and sha256.

    NAME               a part: tensors in safetensors, no pickle, or what its kind of file says
    manifest.json      {"format": KIND, "format_version": 1, "tool_version": ..., ..., "parts": {name: {...}}}

Readers refuse: another kind or a later version; parts that are missing, unlisted, compressed, named twice or
with a path; sizes and hashes that differ from the manifest. Writers refuse what readers would. The same content
gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from turboesm_cli import __version__
from turboesm_cli.errors import BundleError, OutputError
from turboesm_cli.outputs.files import atomic_output
from turboesm_cli.outputs.shard_records import Seal

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "manifest.json"
MANIFEST_LIMIT = 64 << 20
PART_LIMIT = 16 << 30
"""Bytes that are held in memory at once: of a part that is read as a whole, or of a piece of one."""
TEXT_LIMIT = 300
CHUNK = 1 << 20


class Writer:
    """An archive that is being written; `manifest` is what its kind of file adds to the manifest.

    folder  on the disk that the archive is written to; a place for what has to wait
    """

    def __init__(self, archive: zipfile.ZipFile, stream: IO[bytes], folder: Path) -> None:
        self._zip, self._stream, self.folder = archive, stream, folder
        self.manifest: dict[str, Any] = {}
        self._parts: dict[str, dict[str, Any]] = {}

    def add(self, name: str, pieces: Iterable[bytes]) -> None:
        """Write a part, piece by piece as they come."""
        size, digest = 0, hashlib.sha256()
        with self._zip.open(_entry(name), "w", force_zip64=True) as part:
            for piece in pieces:
                part.write(piece)
                digest.update(piece)
                size += len(piece)
        self._parts[name] = {"bytes": size, "sha256": digest.hexdigest()}

    def place(self) -> int:
        """Where in the file the next piece goes; those before it are in the kernel's hands."""
        self._stream.flush()
        return self._stream.tell()

    def finish(self, head: dict[str, Any]) -> None:
        """Write the manifest. Raises OutputError where readers would refuse it."""
        text = json.dumps(head | self.manifest | {"parts": self._parts}, indent=1)
        if len(text) > MANIFEST_LIMIT:
            raise OutputError(f"a manifest of {len(text):,} bytes, over {MANIFEST_LIMIT:,}: nothing is written")
        self._zip.writestr(_entry(MANIFEST), text)


@contextmanager
def new_archive(
    path: Path, kind: str, version: int, seal: Seal | None = None, body: Path | None = None
) -> Iterator[Writer]:
    """An archive to write parts to; the file appears whole or not at all. Raises OutputError.

    seal  of a shard
    body  the file that grows to be the archive, and is written over from its start; see `atomic_output`
    """
    with atomic_output(path, seal, body) as partial, partial.open("r+b") as stream:
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
            writer = Writer(archive, stream, partial.parent)
            yield writer
            writer.finish({"format": kind, "format_version": version, "tool_version": __version__})
        stream.truncate()  # it may have been longer when it was begun


def to_bytes(tensors: dict[str, Tensor]) -> bytes:
    """Tensors as safetensors. Raises OutputError where readers would refuse so many bytes."""
    import safetensors.torch

    data = safetensors.torch.save({key: tensor.cpu().contiguous() for key, tensor in tensors.items()})
    if len(data) > PART_LIMIT:
        raise OutputError(f"{len(data):,} bytes of tensors, over {PART_LIMIT:,}: nothing is written")
    return data


def kind_of(path: Path) -> str:
    """What kind of archive a file says to be, "" where it does not say. Raises BundleError for other files."""
    with _opened(path, "turboesm") as archive:
        try:
            manifest = _manifest(archive)
        except (*_UNREADABLE, KeyError, ValueError):
            return ""
    return str(manifest.get("format", "")) if isinstance(manifest, dict) else ""


class Archive:
    """An archive opened for reading; use it as a context manager. Raises BundleError for what is wrong with it.

    newest  the latest version of its kind that is understood
    """

    def __init__(self, path: Path, kind: str, newest: int) -> None:
        self._path = Path(path)
        self._zip = _opened(self._path, kind)
        self._stamp = self._stamped()
        try:
            self.manifest = self._read_manifest(kind, newest)
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

    @property
    def version(self) -> int:
        """Of the format."""
        return int(self.manifest["format_version"])

    def size(self, name: str) -> int:
        """Bytes of a part."""
        return self._zip.getinfo(name).file_size

    def read(self, name: str) -> dict[str, Tensor]:
        """The tensors of a part that is all tensors, its size and hash checked first."""
        if self.size(name) > PART_LIMIT:
            raise self.broken(f"part {name} has {self.size(name):,} bytes, over {PART_LIMIT:,}")
        return self._tensors(b"".join(self.checked(name)), f"part {name}")

    def dimensions(self, name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype and size of each tensor of a part, its hash checked, without the memory that `read` takes."""
        head = b""
        for chunk in self.checked(name):
            if len(head) < MANIFEST_LIMIT:
                head += chunk
        try:
            length = int.from_bytes(head[:8], "little")
            if length > len(head) - 8:
                raise ValueError(f"a header of {length:,} bytes")
            described = parsed(head[8 : 8 + length])
            return {
                key: (_DTYPES.get(each["dtype"], str(each["dtype"])), tuple(each["shape"]))
                for key, each in described.items()
                if key != "__metadata__"
            }
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise self.broken(f"part {name} holds no tensors ({error})") from error

    def checked(self, name: str) -> Iterator[bytes]:
        """A part's bytes, chunk by chunk; the end comes only where its hash is right."""
        digest = hashlib.sha256()
        try:
            with self._zip.open(name) as part:
                while chunk := part.read(CHUNK):
                    digest.update(chunk)
                    self._check_unchanged()
                    yield chunk
        except _UNREADABLE as error:
            raise self.broken(f"part {name} cannot be read ({error})") from error
        if digest.hexdigest() != self.manifest["parts"][name]["sha256"]:
            raise self.broken(f"part {name} differs from its sha256")

    def lines(self, name: str, limit: int) -> Iterator[bytes]:
        """The lines of a part, of at most about `limit` bytes each; its hash is checked at the end."""
        rest = b""
        for chunk in self.checked(name):
            *whole, rest = (rest + chunk).split(b"\n")
            yield from whole
            if len(rest) > limit:  # before more of it is held
                raise self.broken(f"a line of part {name} has over {limit:,} bytes")
        if rest:
            raise self.broken(f"part {name} ends within a line")

    def piece(self, name: str, offset: int, size: int, sha256: str) -> dict[str, Tensor]:
        """The tensors in `size` bytes from `offset` on of a part, their hash checked first."""
        if size > PART_LIMIT or offset + size > self.size(name):
            raise self.broken(f"{size:,} bytes from {offset:,} on are over {PART_LIMIT:,}, or not in part {name}")
        where = f"part {name} from byte {offset:,} on"
        try:
            data = self._at(self._start(name) + offset, size)
            self._check_unchanged()
        except _UNREADABLE as error:
            raise self.broken(f"{where} cannot be read ({error})") from error
        if len(data) != size or hashlib.sha256(data).hexdigest() != sha256:
            raise self.broken(f"{where} differs from its sha256")
        return self._tensors(data, where)

    def broken(self, reason: str) -> BundleError:
        """The error to raise where the file is not what it should be."""
        return BundleError(f"{self._path} is damaged: {reason}; make it again")

    def _tensors(self, data: bytes, where: str) -> dict[str, Tensor]:
        import safetensors.torch

        try:
            return dict(safetensors.torch.load(data))
        except safetensors.SafetensorError as error:
            raise self.broken(f"{where} holds no tensors ({error})") from error

    def _start(self, name: str) -> int:
        """Where a part's bytes begin in the file: after its local header, which has lengths of its own."""
        at = self._zip.getinfo(name).header_offset
        signature, name_length, extra_length = _LOCAL_HEADER.unpack(self._at(at, _LOCAL_HEADER.size))
        if signature != b"PK\x03\x04":
            raise zipfile.BadZipFile("no header before it")
        return at + _LOCAL_HEADER.size + int(name_length) + int(extra_length)

    def _at(self, offset: int, size: int) -> bytes:
        """Bytes of the file; the position that the zip reads at is left alone."""
        if offset + size > self._stamp[0]:  # before memory is taken
            raise EOFError("the file ends before")
        return _pread(self._handle, offset, size)

    @property
    def _handle(self) -> int:
        assert self._zip.fp is not None
        return self._zip.fp.fileno()

    def _stamped(self) -> tuple[int, int]:
        """Size and time of the last change of the file that is open."""
        found = os.fstat(self._handle)
        return found.st_size, found.st_mtime_ns

    def _check_unchanged(self) -> None:
        """A file may be gone through more than once: it has to be the same each time."""
        if self._stamped() != self._stamp:
            raise BundleError(f"{self._path} changed while it was read; run the command again")

    def _read_manifest(self, kind: str, newest: int) -> dict[str, Any]:
        try:
            manifest = _manifest(self._zip)
        except (*_UNREADABLE, KeyError, ValueError) as error:
            raise self.broken(f"no readable {MANIFEST} ({error})") from error
        if not isinstance(manifest, dict) or manifest.get("format") != kind:
            found = manifest.get("format") if isinstance(manifest, dict) else None
            raise BundleError(f"{self._path} is a {found or 'foreign'} file, not a {kind}; name another file")
        version = manifest.get("format_version")
        if type(version) is not int or not 1 <= version <= newest:
            raise BundleError(
                f"{self._path} has format version {version}, turboesm {__version__} reads up to {newest}; "
                "upgrade turboesm"
            )
        return manifest

    def _check_parts(self) -> None:
        listed = self.manifest.get("parts")
        entries = {entry.filename: entry for entry in self._zip.infolist()}
        if not isinstance(listed, dict) or len(entries) != len(self._zip.infolist()):
            raise self.broken("the list of parts is missing or a part is there twice")
        if set(entries) != {*listed, MANIFEST}:
            raise self.broken("the parts are not those that the manifest lists")
        for name, described in listed.items():
            entry = entries[name]
            if (
                not name.isprintable()
                or Path(name).is_absolute()
                or ".." in Path(name).parts
                or entry.compress_type != zipfile.ZIP_STORED
            ):
                raise self.broken(f"part {name!r} has an unsafe name or is compressed")
            size = described.get("bytes") if isinstance(described, dict) else None
            if type(size) is not int or entry.file_size != size or "sha256" not in described:
                raise self.broken(f"part {name} has {entry.file_size:,} bytes, the manifest says {size}")


def parsed(text: bytes) -> Any:
    """A value written as JSON; no NaN. Raises ValueError."""
    try:
        return _DECODER.decode(text.decode())
    except RecursionError as error:
        raise ValueError("JSON that is too deep") from error


def printable(value: object) -> str:
    """A short text that is safe to show, such as a name. Raises ValueError for anything else."""
    if not isinstance(value, str) or len(value) > TEXT_LIMIT or not value.isprintable():
        raise ValueError(f"{str(value)[:40]!r} is no short printable text")
    return value


_UNREADABLE = (OSError, zipfile.BadZipFile, EOFError, RuntimeError, NotImplementedError)
"""What reading a member raises where it is damaged, encrypted or compressed in an unknown way."""

_DTYPES = {"F32": "float32", "F16": "float16", "U8": "uint8"}
"""What safetensors calls those of a codec."""

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a part: signature, lengths of its name and of the extra field


def _pread(handle: int, offset: int, size: int) -> bytes:
    """As `os.pread`, which gives no more than 2 GiB at once; less only at the end of the file."""
    data = os.pread(handle, size, offset)
    while len(data) < size and (more := os.pread(handle, size - len(data), offset + len(data))):
        data += more
    return data


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
    return parsed(archive.read(entry))


def _no_number(text: str) -> None:
    raise ValueError(f"{text} where a number should be")


_DECODER = json.JSONDecoder(parse_constant=_no_number)


def _entry(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(name)  # the epoch of zip: equal content, equal bytes
