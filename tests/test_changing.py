"""Inputs that change while they are read, and inputs that can be read only once, through the real commands.

An input is changed when the reader has come to a given record, so that a test says at which moment, and can repeat
it.
"""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from test_inputs import CALIBRATION, Place, bundle, check_stopped, place  # noqa: F401  (fixtures)

from turboesm_cli.sequences.identifiers import Seen

pytestmark = pytest.mark.slow

COUNT = 24
"""Proteins in a file of 190 kB, more than is read at once."""

PASSES = {"quantize": 2, "decode": 3}
OUTPUTS = {"quantize": "out.tqkv", "decode": "out.csv", "calibrate": "out.tqz", "bench": "out.csv"}
RUNS = 20
BRIEF = {"decode": ("--prompt", "0.9")}
"""Decode few tokens: what is read is what is tested."""


def fasta(seed: int) -> str:
    draw = random.Random(seed)
    return "".join(
        f">p{number} {'x' * 8000}\n{''.join(draw.choices('MKWVTFISL', k=9))}\n" for number in range(COUNT)
    )


ORIGINAL, OTHER = fasta(1), fasta(2)


def in_place(path: Path, text: str) -> None:
    with path.open("r+") as stream:
        stream.write(text)


def rewrite(path: Path) -> None:
    in_place(path, OTHER)


def rewrite_and_hide_it(path: Path) -> None:
    """As `cp -p` or `touch -r` do after it."""
    before = path.stat()
    in_place(path, OTHER)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def truncate(path: Path) -> None:
    """At the end of a record."""
    os.truncate(path, ORIGINAL.index(f">p{COUNT - 2} "))


def extend(path: Path) -> None:
    with path.open("a") as stream:
        stream.write(">more\nMKWV\n")


def replace(path: Path) -> None:
    path.with_name("new").write_text(OTHER)
    path.with_name("new").rename(path)


def rename(path: Path) -> None:
    path.rename(path.with_name("in.old"))


CHANGES: dict[str, Callable[[Path], None]] = {
    "rewritten": rewrite,
    "rewritten, with its time set back": rewrite_and_hide_it,
    "truncated": truncate,
    "extended": extend,
    "replaced": replace,
    "renamed": rename,
    "deleted": Path.unlink,
}


@contextmanager
def at_record(number: int, change: Callable[[], object]) -> Iterator[None]:
    """Make a change when so many records have been read, all passes together."""
    left = [number]
    add = Seen.add

    def counted(self: Seen, text: str) -> None:
        left[0] -= 1
        if left[0] == 0:
            change()
        add(self, text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Seen, "add", counted)
        yield


@pytest.fixture
def expected(place: Place) -> Callable[[str], bytes]:  # noqa: F811
    """The bytes of a command's output, where nobody touches its input."""

    def run(command: str) -> bytes:
        (place.folder / "in.fasta").write_text(ORIGINAL)
        result = place.run(command, "in.fasta", "--force", *BRIEF.get(command, ()))
        assert result.exit_code == 0, result.stderr
        made = place.folder / OUTPUTS[command]
        found = made.read_bytes()
        made.unlink()
        return found

    return run


def check(place: Place, command: str, expected: bytes, *options: str) -> int:  # noqa: F811
    """Run a command: it ends with what was there at the start, or stops and leaves nothing. Its exit code."""
    result = place.run(command, "in.fasta", *options, *BRIEF.get(command, ()))
    output = place.folder / OUTPUTS[command]
    if result.exit_code == 0:
        assert output.read_bytes() == expected
        output.unlink()
    else:
        assert result.exit_code == 3, result.stderr
        assert "changed while" in result.stderr.splitlines()[-1]
        assert place.names() <= {"in.old"}
    return result.exit_code


@pytest.mark.parametrize("command", PASSES)
def test_no_run_gives_other_proteins_than_were_there(
    command: str,
    place: Place,  # noqa: F811
    expected: Callable[[str], bytes],
) -> None:
    undisturbed = expected(command)
    draw = random.Random(f"{command}")
    codes = []
    for _ in range(RUNS // 2):
        (place.folder / "in.fasta").write_text(ORIGINAL)
        change = CHANGES[draw.choice(sorted(CHANGES))]
        moment = draw.randint(1, PASSES[command] * COUNT)
        with at_record(moment, lambda change=change: change(place.folder / "in.fasta")):
            codes.append(check(place, command, undisturbed))
        (place.folder / "in.old").unlink(missing_ok=True)
    assert set(codes) == {0, 3}


@pytest.mark.parametrize(
    "moment", [1, COUNT // 2, COUNT + 1, COUNT * 3 // 2], ids=lambda moment: f"record {moment}"
)
@pytest.mark.parametrize("change", CHANGES)
def test_each_change_at_each_stage(
    change: str,
    moment: int,
    place: Place,  # noqa: F811
    expected: Callable[[str], bytes],
) -> None:
    undisturbed = expected("quantize")
    with at_record(moment, lambda: CHANGES[change](place.folder / "in.fasta")):
        code = check(place, "quantize", undisturbed)
    if change in ("replaced", "renamed", "deleted") and moment > COUNT:
        assert code == 0
    if change in ("rewritten", "truncated", "extended"):
        assert code == 3


def test_the_proteins_in_use_are_checked_where_there_are_more(place: Place) -> None:  # noqa: F811
    (place.folder / "in.fasta").write_text(ORIGINAL)
    with at_record(COUNT + 1, lambda: truncate(place.folder / "in.fasta")):
        result = place.run("quantize", "in.fasta", "--max-proteins", str(COUNT - 5))
    check_stopped(result, place, 3, "changed while")


@pytest.mark.parametrize("command", ["calibrate", "bench"])
@pytest.mark.parametrize("change", ["rewritten", "rewritten, with its time set back", "truncated"])
def test_commands_that_read_once(change: str, command: str, place: Place) -> None:  # noqa: F811
    (place.folder / "in.fasta").write_text(ORIGINAL)
    with at_record(COUNT // 2, lambda: CHANGES[change](place.folder / "in.fasta")):
        check_stopped(place.run(command, "in.fasta"), place, 3, "in.fasta changed while it was read")


def test_mends_and_rejects_are_told_once(place: Place) -> None:  # noqa: F811
    (place.folder / "in.fasta").write_text(">a\nmkwv\n>bad\nM!\n>c\nMKWVTF\n")
    result = place.run("decode", "in.fasta", "--rejects", "r.tsv")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count("upper-cased") == result.stderr.count("skipped record") == 1
    assert len((place.folder / "r.tsv").read_text().splitlines()) == 2


@contextmanager
def fed(text: str) -> Iterator[str]:
    """The path of a pipe that a slow program writes to, as a shell's `<(...)` gives it."""
    reading, writing = os.pipe()

    def write() -> None:
        with suppress(BrokenPipeError), os.fdopen(writing, "wb", buffering=0) as stream:
            for line in text.splitlines(keepends=True):
                stream.write(line.encode())

    writer = threading.Thread(target=write)
    writer.start()
    try:
        yield f"/dev/fd/{reading}"
    finally:
        os.close(reading)
        writer.join()


SMALL = "".join(f">p{number}\n{'MKWVTFISLLFLFSSAYSRGVFRRDAHKSEVAHRF'[number:]}\n" for number in range(12))


@pytest.mark.parametrize("command", OUTPUTS)
def test_process_substitution(command: str, place: Place) -> None:  # noqa: F811
    (place.folder / "in.fasta").write_text(SMALL)
    brief = BRIEF.get(command, ())
    assert place.run(command, "in.fasta", *brief).exit_code == 0
    output = place.folder / OUTPUTS[command]
    expected = output.read_bytes()
    output.unlink()
    with fed(SMALL) as path:
        result = place.run(command, path, "-o", output.name, "--force", *brief)
    assert result.exit_code == 0, result.stderr
    if command in ("quantize", "decode"):
        named = expected.replace(b" in.fasta", f" {Path(path).name}".encode())  # in the rows' command
        assert output.read_bytes() == named and "of 12 proteins" in result.stderr
    elif command == "calibrate":
        assert "12 proteins" in result.stderr
    else:
        assert f"{Path(path).name}: 12 of 12 proteins" in result.stderr


def test_bench_calibrates_from_a_pipe(place: Place) -> None:  # noqa: F811
    (place.folder / "in.fasta").write_text(SMALL)
    with fed(Path(CALIBRATION).read_text()) as path:
        result = place.run("bench", "in.fasta", "--calibration", path)
    assert result.exit_code == 0, result.stderr


def test_files_of_two_species_are_two_families(place: Place) -> None:  # noqa: F811
    for name in ("E.coli.fasta", "E.faecalis.faa.gz"):
        (place.folder / name).write_text(SMALL)
    result = place.run("bench", "E.coli.fasta,E.faecalis.faa.gz")
    assert result.exit_code == 0, result.stderr
    assert "E.coli: 12 of 12 proteins" in result.stderr and "E.faecalis: 12 of 12" in result.stderr


def test_a_named_pipe(place: Place) -> None:  # noqa: F811
    os.mkfifo(place.folder / "in.fasta")
    writer = threading.Thread(target=(place.folder / "in.fasta").write_text, args=[SMALL])
    writer.start()
    result = place.run("decode", "in.fasta", *BRIEF["decode"])
    writer.join()
    assert result.exit_code == 0 and "of 12 proteins" in result.stderr, result.stderr


@pytest.mark.parametrize("kind", ["pipe", "socket", "file"])
def test_dev_stdin(kind: str, place: Place) -> None:  # noqa: F811
    arguments = [
        "decode",
        str(place.bundle),
        "/dev/stdin",
        "-o",
        "out.csv",
        "--model",
        place.model,
        *BRIEF["decode"],
    ]
    command = [sys.executable, "-m", "turboesm_cli.app", *arguments]
    (place.folder / "in.fasta").write_text(SMALL)
    if kind == "pipe":
        done = subprocess.run(command, input=SMALL, capture_output=True, text=True)
    elif kind == "file":
        with (place.folder / "in.fasta").open() as stream:
            done = subprocess.run(command, stdin=stream, capture_output=True, text=True)
    else:
        ours, theirs = socket.socketpair()
        ours.sendall(SMALL.encode())
        ours.close()
        done = subprocess.run(command, stdin=theirs, capture_output=True, text=True)
        theirs.close()
    assert done.returncode == 0 and "of 12 proteins" in done.stderr, done.stderr


def test_caches_through_a_pipe_are_refused_by_name(place: Place) -> None:  # noqa: F811
    (place.folder / "in.fasta").write_text(SMALL)
    assert place.run("quantize", "in.fasta").exit_code == 0
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as stream:  # less than a pipe holds
        stream.write((place.folder / "out.tqkv").read_bytes()[:30_000])
    result = place.run("decode", f"/dev/fd/{reading}")
    os.close(reading)
    check_stopped(result, place, 3, "is a zip file", "out.tqkv")
    assert "never piped" in result.stderr


@pytest.mark.parametrize("command", ["quantize", "decode"])
def test_a_bundle_that_is_replaced_while_it_is_read(
    command: str,
    place: Place,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from turboesm_cli.codec import bundle as bundles

    (place.folder / "in.fasta").write_text(SMALL)
    path = place.folder.parent / "own.tqz"
    path.write_bytes(place.bundle.read_bytes())
    read = bundles.read_bundle

    def meanwhile(name: Path) -> object:
        found = read(name)
        path.write_bytes(path.read_bytes() + b" ")
        return found

    monkeypatch.setattr(bundles, "read_bundle", meanwhile)
    own = Place(place.folder, place.model, path)
    check_stopped(own.run(command, "in.fasta"), own, 5, "changed while it was read")
