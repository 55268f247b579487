"""Packed caches on disk: what `quantize` writes and `decode` goes on from.

manifest: bundle_sha256, model {name, fingerprint}, proteins: for each {accession, sequence, cached: tokens held,
part, bytes: of its cache in memory}; one part a protein, the tensors of its `PackedCache`.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from turboesm_cli.archive import MANIFEST, Archive, printable, write_archive
from turboesm_cli.bundle import Bundle
from turboesm_cli.cache import PackedCache, check_tensors
from turboesm_cli.errors import BundleError, InputError
from turboesm_cli.sequences import RECORD_CAP, Protein, tokenize

KIND = "turboesm-caches"


@dataclass(frozen=True)
class CachedProtein:
    """A protein whose first `cached` tokens (`<cls>` counted) are in `cache`."""

    protein: Protein
    cached: int
    cache: PackedCache


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_packfile(path: Path) -> bool:
    """Whether `path` is a file of caches, or is a zip file that is too damaged to tell; pipes are left alone."""
    try:
        if not Path(path).is_file():
            return False
        with Path(path).open("rb") as stream:
            if stream.read(4) != b"PK\x03\x04":
                return False
            with zipfile.ZipFile(stream) as found:
                return any(name == MANIFEST for name in found.namelist())
    except zipfile.BadZipFile:
        return True
    except (OSError, ValueError, NotImplementedError):
        return False


def write_packfile(path: Path, bundle: Bundle, bundle_sha256: str, caches: Iterable[CachedProtein]) -> None:
    """Write caches as they come, one in memory at a time. Raises OutputError."""
    described: list[dict[str, Any]] = []
    manifest = {
        "bundle_sha256": bundle_sha256,
        "model": {"name": bundle.model_name, "fingerprint": bundle.fingerprint},
        "proteins": described,
    }

    def parts() -> Iterator[tuple[str, dict[str, Tensor]]]:
        for index, item in enumerate(caches):
            part = f"caches/{index:06d}.safetensors"
            described.append(
                {
                    "accession": item.protein.accession,
                    "sequence": item.protein.sequence,
                    "cached": item.cached,
                    "part": part,
                    "bytes": item.cache.nbytes,
                }
            )
            yield part, item.cache.tensors

    write_archive(path, KIND, manifest, parts())


@dataclass(frozen=True)
class StoredProtein:
    """A protein whose first `cached` tokens are in a file; `read` gives the tensors of their `PackedCache`.

    `read` raises BundleError where they are damaged.
    """

    protein: Protein
    cached: int
    read: Callable[[], dict[str, Tensor]]


class Packfile:
    """The caches of a file, one by one: a context, in which they can be read at any time.

    Raises BundleError where the file is damaged or was packed with another bundle.
    """

    def __init__(self, path: Path, bundle: Bundle, bundle_sha256: str) -> None:
        self._path, self._spec = path, bundle.spec
        self._archive = Archive(path, KIND)
        try:
            if self._archive.manifest.get("bundle_sha256") != bundle_sha256:
                raise BundleError(f"{path} was packed with another bundle; name the one that it was packed with")
            self._listed = described_proteins(self._archive.manifest, path)
        except BundleError:
            self._archive.__exit__()
            raise

    def __enter__(self) -> Packfile:
        return self

    def __exit__(self, *_: object) -> None:
        self._archive.__exit__()

    def __len__(self) -> int:
        return len(self._listed)

    def __iter__(self) -> Iterator[StoredProtein]:
        for item in self._listed:
            yield StoredProtein(item.protein, item.cached, partial(self._read, item.part, item.cached))

    def _read(self, part: str, cached: int) -> dict[str, Tensor]:
        tensors = self._archive.read(part)
        try:
            check_tensors(self._spec, tensors, cached)
        except (ValueError, RuntimeError) as error:
            raise BundleError(f"{self._path} is damaged: {error}; quantize again") from error
        return tensors


@dataclass(frozen=True)
class Described:
    """What a manifest says of a protein: how many of its tokens are cached, in which part, in how many bytes."""

    protein: Protein
    cached: int
    part: str
    nbytes: int


def described_proteins(manifest: dict[str, Any], path: Path) -> list[Described]:
    """The proteins that a manifest lists, checked. Raises BundleError."""
    found = manifest.get("proteins")
    if not isinstance(found, list) or not found:
        raise BundleError(f"{path} lists no proteins; quantize again")
    try:
        return [_described(item, manifest["parts"], path) for item in found]
    except (LookupError, TypeError, ValueError, InputError) as error:
        raise BundleError(f"{path} is damaged: {error}; quantize again") from error


def _described(described: dict[str, Any], parts: dict[str, Any], path: Path) -> Described:
    """At least `<eos>` is left to decode."""
    accession, sequence, cached = described["accession"], described["sequence"], described["cached"]
    part, nbytes = described["part"], described["bytes"]
    if not isinstance(sequence, str) or type(cached) is not int or type(nbytes) is not int or nbytes < 0:
        raise ValueError("a sequence or a count is of the wrong type")
    if len(sequence) > RECORD_CAP or printable(part) not in parts:
        raise ValueError(f"a sequence of {len(sequence):,} letters, or a part {part!r} that is not there")
    protein = Protein(printable(accession), "", sequence, source=str(path))
    tokenize(sequence)
    if not 0 < cached <= protein.residues + 1:
        raise ValueError(f"{cached} tokens cached of {protein.residues + 2}")
    return Described(protein, cached, part, nbytes)
