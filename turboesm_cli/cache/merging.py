"""Files of caches of shards → the file of all, in memory that does not grow with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from turboesm_cli.cache.cache_file import CACHES, KIND, PROTEINS, VERSION, Packfile
from turboesm_cli.errors import InputError
from turboesm_cli.outputs.archive import new_archive
from turboesm_cli.outputs.shard_records import Part, check_bytes


def merge_packfiles(path: Path, parts: Sequence[Part], devices: str = "") -> None:
    """Write the caches of all parts, in their order, as the run that was never split does.

    devices  those that they were made on, where they are more than one

    Raises OutputError; InputError or BundleError where a part is not what its shard wrote.
    """
    heads = []
    for part in parts:
        check_bytes(part)
        with Packfile(part.path) as file:
            heads.append({name: file.archive.manifest[name] for name in ("bundle_sha256", "model", "proteins")})
    if any(head | {"proteins": 0} != heads[0] | {"proteins": 0} for head in heads):
        raise InputError(f"{parts[0].path} and others hold caches of different bundles; merge those of one")
    with new_archive(path, KIND, VERSION) as archive:
        archive.manifest = heads[0] | {"proteins": sum(int(head["proteins"]) for head in heads)}
        archive.manifest |= {"devices": devices} if devices else {}
        for name in (CACHES, PROTEINS):
            archive.add(name, _joined(parts, name))


def _joined(parts: Sequence[Part], name: str) -> Iterator[bytes]:
    """A part of each file, one after another, each checked by the time that it ends."""
    for part in parts:
        with Packfile(part.path) as file:
            yield from file.archive.checked(name)
