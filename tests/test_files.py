"""Outputs appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from turboesm_cli.errors import OutputError
from turboesm_cli.outputs.files import atomic_output, check_output, write_text


@pytest.fixture
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def fail_midway(path: Path, error: BaseException) -> None:
    with atomic_output(path) as partial:
        partial.write_text("half")
        raise error


def test_content_is_whole_and_alone(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    write_text(path, "Protéine\n" * 1000)
    assert path.read_text(encoding="utf-8") == "Protéine\n" * 1000
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_at_the_path_before_the_end(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    with atomic_output(path) as partial:
        partial.write_text("whole")
        assert not path.exists()
        assert partial.parent == path.parent, "a rename is atomic only within one file system"
    assert path.read_text() == "whole"


def test_missing_folders_are_made(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b" / "out.txt", "whole")
    assert (tmp_path / "a" / "b" / "out.txt").read_text() == "whole"


ERRORS = [ValueError("a defect"), KeyboardInterrupt(), SystemExit(143)]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_output_is_absent_after_an_exception(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)):
        fail_midway(tmp_path / "out.txt", error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_old_content_is_kept_after_an_exception(error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    path.write_text("old")
    with pytest.raises(type(error)):
        fail_midway(path, error)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_old_content_is_replaced_after_success(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    path.write_text("old and longer")
    write_text(path, "new")
    assert path.read_text() == "new"


def test_a_full_disk_is_an_output_error(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    with pytest.raises(OutputError, match=r"cannot write .*out\.txt: No space left on device"):
        fail_midway(path, OSError(28, "No space left on device"))
    assert list(tmp_path.iterdir()) == []


def test_a_failing_sync_publishes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    with (
        mock.patch("os.fsync", side_effect=OSError(5, "Input/output error")),
        pytest.raises(OutputError, match="Input/output error"),
    ):
        write_text(path, "whole")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o000, 0o027], indirect=True, ids=oct)
def test_permission_bits_follow_the_umask(umask: int, tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    write_text(path, "whole")
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    assert os.umask(umask) == umask, "the umask is left as it was"


def test_unwritable_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("this user may write everywhere")
    with pytest.raises(OutputError, match="Permission denied; choose another output path"):
        write_text(tmp_path / "out.txt", "whole")
    tmp_path.chmod(0o755)


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(OutputError, match="choose another output path"):
        write_text(tmp_path / "file" / "out.txt", "whole")
    assert (tmp_path / "file").read_text() == "old"


def test_a_folder_in_place_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="cannot write"):
        write_text(tmp_path / "out", "whole")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_what_cannot_be_written_is_found_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("old")
    check_output(tmp_path / "new", may_exist=False)
    check_output(tmp_path / "there", may_exist=True)
    check_output(tmp_path / "not" / "yet" / "made", may_exist=False)
    for path, reason in (
        (tmp_path / "there", "--force"),
        (tmp_path, "folder"),
        (tmp_path / "there" / "x", "no folder"),
        (Path("-"), "stdout"),
        (Path("/dev/null"), "no regular file"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        with pytest.raises(OutputError, match=reason):
            check_output(path, may_exist=path == Path("/dev/null"))
