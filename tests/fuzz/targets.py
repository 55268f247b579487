"""What is fuzzed: bytes in, an exception out only where turboesm has a defect.

A FASTA input's first byte chooses the policy. An input for archives is either a whole file, or edits of a golden
one whose sizes and hashes are made right again, as a forger would do: nothing else would come past the hashes.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from turboesm_cli.cache.cache_file import Packfile
from turboesm_cli.cache.inventory import facts_of, tables_of
from turboesm_cli.cache.packed import PackedCodec
from turboesm_cli.codec.bundle import read_bundle
from turboesm_cli.errors import TurboESMError
from turboesm_cli.models.esm2_alphabet import ESM2_ALPHABET
from turboesm_cli.outputs.files import file_sha256
from turboesm_cli.sequences.fasta import LongPolicy, ReadPolicy, ReadReport, read_fasta
from turboesm_cli.sequences.lookalikes import is_nucleotides, no_protein, no_residues

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
NAMES = ("flat-v1.tqz", "auto-v1.tqz", "flat-v1.tqkv", "auto-v1.tqkv")
LATER = ("flat-v2.tqkv", "auto-v2.tqkv")
POLICIES = [
    ReadPolicy(strict=strict, long=long, max_residues=limit)
    for strict in (False, True)
    for long in LongPolicy
    for limit in (1022, 3)
]
LINES = "proteins.jsonl"
VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1, 2, 3, 2**31, 2**63, 10**30, 0.5, float("nan"), float("inf"), "", "flat", "k", "../x",
    "\0", "x" * 1000, [], [1], [None], {}, {"a": 1}, [[]], "0" * 64,
)  # fmt: skip


def fasta(data: bytes) -> None:
    """Read bytes as FASTA; what passes is of ESM-2's alphabet, within the limit, named apart, no look-alike."""
    policy = POLICIES[(data[0] if data else 0) % len(POLICIES)]
    report = ReadReport()
    with mock.patch.object(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data[1:]))):
        try:
            proteins = list(read_fasta("-", policy, report))
        except TurboESMError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
            return
    assert report.accepted == len({protein.record for protein in proteins}) > 0
    assert len({protein.accession for protein in proteins}) == len(proteins)
    assert not (policy.strict and (report.mended or report.rejects))
    for protein in proteins:
        assert 1 <= protein.residues == len(ESM2_ALPHABET.tokenize(protein)) - 2 <= policy.max_residues
        assert f"{protein.accession}{protein.description}".isprintable()
        assert not no_protein(protein.accession) and "." not in protein.sequence
        if protein.residues < policy.max_residues:  # not a part
            assert not is_nucleotides(protein.sequence) and not no_residues([protein.sequence], [])


def archive(data: bytes) -> None:
    """Read bytes as a bundle or as caches; what passes can be used and told of."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        name, content = _archive_of(data)
        path = Path(folder) / name
        path.write_bytes(content)
        try:
            _use(path)
        except TurboESMError as error:
            assert "\n" not in str(error) and str(path) in str(error)
        assert [found.name for found in Path(folder).iterdir()] == [name]


def _use(path: Path) -> None:
    if path.suffix == ".tqz":
        bundle = read_bundle(path)
        PackedCodec(bundle.spec, _CPU)
    else:
        golden = GOLDEN / f"{path.stem.split('-')[0]}-v1.tqz"
        with Packfile(path, read_bundle(golden), file_sha256(golden)) as stored:
            for protein in stored:
                protein.read()
    facts = facts_of(path)
    json.dumps(facts)
    assert all(isinstance(cell, str) for _, _, rows in tables_of(facts) for row in rows for cell in row)


def _archive_of(data: bytes) -> tuple[str, bytes]:
    """A file's name and bytes: byte 0 chooses the golden file and whether it is edited or replaced."""
    choice = data[0] if data else 0
    name = LATER[choice % 2] if choice & 0x40 else NAMES[choice % len(NAMES)]
    if choice & 0x80:
        return name, data[1:]
    return name, _edited((GOLDEN / name).read_bytes(), iter(data[1:]))


def _edited(golden: bytes, numbers: Iterator[int]) -> bytes:
    with zipfile.ZipFile(io.BytesIO(golden)) as found:
        members = {name: bytearray(found.read(name)) for name in found.namelist()}
    manifest = json.loads(members.pop("manifest.json"))
    for kind in numbers:
        if kind % 4 == 1 and LINES in members:
            members[LINES] = _edited_lines(members[LINES], numbers)
        elif kind % 4 == 0 and members:
            part = members[sorted(members)[next(numbers, 0) % len(members)]]
            at = (next(numbers, 0) << 8 | next(numbers, 0)) % max(1, len(part))
            part[at : at + 1] = bytes([next(numbers, 0)])
        else:
            _edit(manifest, numbers)
    parts = manifest.get("parts")
    for name, part in members.items():
        if isinstance(parts, dict) and isinstance(parts.get(name), dict):
            parts[name] |= {"bytes": len(part), "sha256": hashlib.sha256(part).hexdigest()}
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as made:
        for name, part in members.items():
            made.writestr(name, bytes(part))
        made.writestr("manifest.json", json.dumps(manifest))
    return out.getvalue()


def _edited_lines(text: bytearray, numbers: Iterator[int]) -> bytearray:
    """Lines of JSON with one of them edited, doubled or dropped."""
    try:
        lines = [json.loads(line) for line in text.splitlines()]
    except ValueError:  # bytes of it were edited before
        return text
    what = next(numbers, 0)
    if lines and what % 8 == 0:
        lines.append(lines[what // 8 % len(lines)])
    elif lines and what % 8 == 1:
        del lines[what // 8 % len(lines)]
    else:
        _edit(lines, numbers)
    return bytearray(b"".join(json.dumps(line).encode() + b"\n" for line in lines))


def _edit(value: Any, numbers: Iterator[int]) -> None:
    """Walk down by the next numbers, and at the end replace, drop or add something."""
    while isinstance(value, dict | list) and value:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = keys[next(numbers, 0) % len(keys)]
        what = next(numbers, 0)
        if what % 4 == 0 or not isinstance(value[key], dict | list):
            new = copy.deepcopy(VALUES[what // 4 % len(VALUES)])
            if what >= 200:
                del value[key]
            else:
                value[key] = new
            return
        value = value[key]


TARGETS = {"fasta": fasta, "archive": archive}


def _cpu() -> Any:
    import torch

    return torch.device("cpu")


_CPU = _cpu()
