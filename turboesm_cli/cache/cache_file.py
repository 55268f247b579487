"""Packed caches on disk: what `quantize` writes and `decode` goes on from.

    caches.bin       the tensors of each protein's `PackedCache` as safetensors, one after another
    proteins.jsonl   for each, in that order, a line of JSON: accession, sequence, tags: what the
                     model is told before it, if anything, cached: tokens held, bytes: of
                     the cache in memory, stored: bytes in caches.bin, sha256: of these
    manifest.json    bundle_sha256, model {name, fingerprint}, proteins: how many

That is version 2, written and read in memory that does not grow with the number of proteins. Version 1 had a part
a protein, and `proteins` in the manifest listed what the lines say, with the part's name; it is still read.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from turboesm_cli.errors import BundleError, InputError
from turboesm_cli.models.alphabet import Alphabet
from turboesm_cli.models.families import FIRST, alphabet_of
from turboesm_cli.outputs.archive import (
    CHUNK,
    MANIFEST,
    PART_LIMIT,
    Archive,
    Writer,
    new_archive,
    parsed,
    printable,
)
from turboesm_cli.outputs.pieces import Piece
from turboesm_cli.outputs.shard_records import Seal
from turboesm_cli.outputs.work import NOTHING_KEPT, Work
from turboesm_cli.sequences.fasta import Protein
from turboesm_cli.sequences.records import RECORD_CAP
from turboesm_cli.sequences.residues import MASK_TEXT, count

if TYPE_CHECKING:
    from torch import Tensor

    from turboesm_cli.codec.bundle import Bundle

    Tensors = dict[str, Tensor]

KIND = "turboesm-caches"
VERSION = 2
CACHES = "caches.bin"
PROTEINS = "proteins.jsonl"
LETTERS_LIMIT = RECORD_CAP * len(MASK_TEXT)
LINE_LIMIT = 8 << 20
"""Bytes of a line about one protein: its sequence, if need be of masks alone, and what else is said of it."""
HEADER_ROOM = 1 << 20
"""Bytes that safetensors' header of a cache may take at most."""


@dataclass(frozen=True)
class CachedProtein:
    """A protein, and a `PackedCache` that holds its first `cached` tokens, `<cls>` counted, as safetensors."""

    protein: Protein
    cached: int
    data: bytes

    @property
    def nbytes(self) -> int:
        """Bytes that the cache holds: all but the header and its length."""
        return len(self.data) - 8 - int.from_bytes(self.data[:8], "little")


@dataclass(frozen=True)
class StoredProtein:
    """A protein whose first `cached` tokens are in a file; `read` gives the tensors of their `PackedCache`.

    nbytes  what that cache holds in memory
    read    raises BundleError where they are damaged
    """

    protein: Protein
    cached: int
    nbytes: int
    read: Callable[[], Tensors]


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


def check_storable(accession: object, sequence: object) -> None:
    """Raise ValueError for a protein that no file of caches holds: writers ask before the work, readers, too."""
    printable(accession)
    if not isinstance(sequence, str) or len(sequence) > LETTERS_LIMIT or count(sequence) > RECORD_CAP:
        raise ValueError(f"no text, or a sequence of over {RECORD_CAP:,} residues")


def check_longest(bundle: Bundle, tokens: int) -> None:
    """Raise InputError where the cache of so many tokens would be more than readers hold at once."""
    size = bundle.spec.size.sequence_bytes(tokens)
    if size + HEADER_ROOM > PART_LIMIT:
        raise InputError(f"a cache of {tokens:,} tokens takes {size:,} bytes, over {PART_LIMIT:,}: cut it")


def storable(rule: Callable[[Protein], int]) -> Callable[[Protein], int]:
    """A rule that says how much of a protein is prompt, and raises InputError for one that cannot be stored."""

    def checked(protein: Protein) -> int:
        try:
            check_storable(protein.accession, protein.sequence)
        except ValueError as error:
            raise InputError(f"{protein.source}: record {protein.record}: {error}; mend or remove it") from error
        return rule(protein)

    return checked


def write_packfile(
    path: Path,
    bundle: Bundle,
    bundle_sha256: str,
    caches: Iterable[CachedProtein],
    work: Work = NOTHING_KEPT,
    seal: Seal | None = None,
) -> None:
    """Write caches as they come, one in memory at a time. Raises OutputError; InputError where there is none.

    work  where each is noted, by its number, once it is in the file that grows to be the output; where the caches
          were made on more than one device, the manifest names them
    seal  of a shard, which may hold no proteins
    """

    def finished(body: Path) -> None:
        if seal is not None:
            seal(body)
        work.save_finished(body)

    with (
        new_archive(path, KIND, VERSION, finished, work.body) as archive,
        tempfile.TemporaryFile(dir=archive.folder) as lines,
    ):
        archive.manifest = {
            "bundle_sha256": bundle_sha256,
            "model": {"name": bundle.model_name, "fingerprint": bundle.fingerprint}
            | ({"family": bundle.family} if bundle.family != FIRST else {}),
            "proteins": 0,
        } | ({"devices": work.devices} if work.devices else {})
        archive.add(CACHES, _stored(caches, lines, archive, bundle.alphabet, work))
        if not archive.manifest["proteins"] and seal is None:
            raise InputError(f"no proteins to write to {path}; check the input")
        lines.seek(0)
        archive.add(PROTEINS, iter(partial(lines.read, CHUNK), b""))


def _stored(
    caches: Iterable[CachedProtein], lines: IO[bytes], archive: Writer, alphabet: Alphabet, work: Work
) -> Iterator[bytes]:
    """The caches as bytes, counted and noted; what describes them goes to `lines`, which wait on disk."""
    for number, item in enumerate(caches):
        check_storable(item.protein.accession, item.protein.sequence)
        sha256 = hashlib.sha256(item.data)
        described = {
            "accession": item.protein.accession,
            "sequence": item.protein.sequence,
            "cached": item.cached,
            "bytes": item.nbytes,
            "stored": len(item.data),
            "sha256": sha256.hexdigest(),
        } | ({"tags": tags} if (tags := alphabet.tags(item.protein)) else {})
        lines.write(json.dumps(described, separators=(",", ":")).encode() + b"\n")
        archive.manifest["proteins"] += 1
        at = archive.place()
        yield item.data
        archive.place()
        work.save_piece(str(number), Piece(at, len(item.data), sha256.digest()))


class Packfile:
    """The caches of a file, one by one: a context, in which they can be read at any time.

    Raises BundleError where the file is damaged or, if `bundle` is given, was packed with another one. What is
    said of a protein is checked when it comes, its tensors when they are read.
    """

    def __init__(self, path: Path, bundle: Bundle | None = None, bundle_sha256: str = "") -> None:
        self._path, self._spec = path, bundle.spec if bundle else None
        self.archive = Archive(path, KIND, VERSION)
        self._alphabet = bundle.alphabet if bundle else _alphabet_of(self.archive)
        try:
            if bundle and self.archive.manifest.get("bundle_sha256") != bundle_sha256:
                packed = str(self.archive.manifest.get("bundle_sha256"))[:16]
                raise BundleError(
                    f"{path} was packed with another bundle: name that of sha256 {packed}..., this one has "
                    f"{bundle_sha256[:16]}..."
                )
            self._count = _count_of_parts(self.archive) if self.archive.version == 1 else _count(self.archive)
        except BaseException:
            self.archive.__exit__()
            raise

    def __enter__(self) -> Packfile:
        return self

    def __exit__(self, *_: object) -> None:
        self.archive.__exit__()

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[StoredProtein]:
        found = self._of_parts() if self.archive.version == 1 else self._of_lines()
        try:
            yield from found
        except (LookupError, TypeError, ValueError, InputError) as error:
            raise self.archive.broken(str(error)) from error

    def _of_parts(self) -> Iterator[StoredProtein]:
        """Version 1."""
        for item in self.archive.manifest["proteins"]:
            if printable(item["part"]) not in self.archive.manifest["parts"]:
                raise ValueError(f"part {item['part']!r} is not there")
            yield self._described(item, partial(self.archive.read, item["part"]))

    def _of_lines(self) -> Iterator[StoredProtein]:
        """Version 2."""
        offset = number = 0
        for line in self.archive.lines(PROTEINS, LINE_LIMIT):
            item = parsed(line)
            stored, digest = item["stored"], item["sha256"]
            if type(stored) is not int or stored < 0 or not isinstance(digest, str):
                raise ValueError("a size or sha256 is of the wrong type")
            yield self._described(item, partial(self.archive.piece, CACHES, offset, stored, digest))
            offset, number = offset + stored, number + 1
        if (offset, number) != (self.archive.size(CACHES), self._count):
            raise ValueError(f"{number:,} proteins in {offset:,} bytes are listed, not all that are there")

    def _described(self, item: dict[str, Any], read: Callable[[], Tensors]) -> StoredProtein:
        """A protein as a line says, checked: at least `<eos>` is left to decode."""
        sequence, cached, nbytes = item["sequence"], item["cached"], item["bytes"]
        check_storable(item["accession"], sequence)
        if type(cached) is not int or type(nbytes) is not int or nbytes < 0:
            raise ValueError("a count is of the wrong type")
        tags = printable(item.get("tags", ""))
        protein = Protein(item["accession"], tags, sequence, source=str(self._path))
        tokens = len(self._alphabet.tokenize(protein)) if self._alphabet else None
        if not cached > 0 or (tokens is not None and cached >= tokens):
            raise ValueError(f"{cached} tokens cached of {tokens}")
        return StoredProtein(protein, cached, nbytes, partial(self._read, read, cached))

    def _read(self, read: Callable[[], Tensors], cached: int) -> Tensors:
        from turboesm_cli.cache.packed import check_tensors

        tensors = read()
        try:
            if self._spec is not None and self._alphabet is not None:
                check_tensors(self._spec, self._alphabet, tensors, cached)
        except (ValueError, RuntimeError) as error:
            raise self.archive.broken(str(error)) from error
        return tensors


def _alphabet_of(archive: Archive) -> Alphabet | None:
    """The tokens that a file's proteins are written in, where that is known without a bundle."""
    model = archive.manifest.get("model")
    is_other = isinstance(model, dict) and model.get("family", FIRST) != FIRST
    return None if is_other else alphabet_of()


def _count(archive: Archive) -> int:
    """How many proteins a file of version 2 says to hold, its lines' hash checked."""
    if {*archive.parts} != {CACHES, PROTEINS}:
        raise archive.broken(f"its parts are not {CACHES} and {PROTEINS}")
    found = archive.manifest.get("proteins")
    if type(found) is not int or found < 0:
        raise archive.broken("it does not say how many proteins it holds")
    if sum(chunk.count(b"\n") for chunk in archive.checked(PROTEINS)) != found:
        raise archive.broken(f"{PROTEINS} has not as many lines as there are proteins")
    return found


def _count_of_parts(archive: Archive) -> int:
    """The same of version 1."""
    listed = archive.manifest.get("proteins")
    if not isinstance(listed, list) or not listed:
        raise archive.broken("it lists no proteins")
    return len(listed)
