"""Output folders appear whole or not at all."""

import errno
import os
import subprocess
import sys
import textwrap

import pytest

from compress.errors import DiskFull, OutputError
from compress.folders import disk_errors, kept_folder, new_file, new_folder


def test_a_new_folder_appears_when_the_block_ends(tmp_path):
    with new_folder(tmp_path / "out") as partial:
        (partial / "a").write_text("1")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "a").read_text() == "1"
    assert os.listdir(tmp_path) == ["out"]


def test_a_failed_block_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="cause"), new_folder(tmp_path / "out") as partial:
        (partial / "a").write_text("1")
        raise ValueError("cause")
    assert os.listdir(tmp_path) == []


def test_a_new_file_appears_when_the_block_ends(tmp_path):
    into = tmp_path / "new" / "a.txt"
    with pytest.raises(ValueError, match="cause"), new_file(into) as partial:
        partial.write_text("half")
        raise ValueError("cause")
    assert os.listdir(into.parent) == []
    for text in ("one", "two"):
        with new_file(into, force=text == "two") as partial:
            partial.write_text(text)
    assert into.read_text() == "two"
    assert os.listdir(into.parent) == ["a.txt"]
    with pytest.raises(OutputError, match=f"The output {into} exists."), new_file(into):
        pass
    with pytest.raises(OutputError, match="The output file .* cannot be written"), new_file(into / "b.txt"):
        pass


def test_a_kept_folder_survives_a_failure_and_is_found_again(tmp_path):
    with pytest.raises(ValueError, match="cause"), kept_folder(tmp_path / "out") as partial:
        (partial / "a").write_text("1")
        raise ValueError("cause")
    assert os.listdir(tmp_path) == ["out.partial"]
    with kept_folder(tmp_path / "out") as partial:
        assert (partial / "a").read_text() == "1"
    assert os.listdir(tmp_path) == ["out"]


def test_an_existing_folder_is_refused_and_kept(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("1")
    with pytest.raises(OutputError, match="exists and is not empty") as caught, new_folder(tmp_path / "out"):
        pass
    assert "--force" in caught.value.remedy
    assert (tmp_path / "out" / "precious").read_text() == "1"


def test_force_replaces_only_when_the_block_ends_well(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("1")
    with pytest.raises(ValueError, match="cause"), new_folder(tmp_path / "out", force=True):
        raise ValueError("cause")
    assert os.listdir(tmp_path / "out") == ["old"]
    with new_folder(tmp_path / "out", force=True) as partial:
        (partial / "new").write_text("1")
    assert os.listdir(tmp_path / "out") == ["new"]


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "out").write_text("1")
    with pytest.raises(OutputError, match="is a file"), new_folder(tmp_path / "out", force=True):
        pass


def test_a_parent_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("1")
    with pytest.raises(OutputError, match="cannot be written"), new_folder(tmp_path / "file" / "out"):
        pass


def test_two_runs_do_not_write_one_folder(tmp_path):
    with new_folder(tmp_path / "out"):
        with pytest.raises(OutputError, match="Another run is writing"), new_folder(tmp_path / "out"):
            pass
    assert os.listdir(tmp_path) == ["out"]


def test_a_killed_run_leaves_no_output_and_no_lock(tmp_path):
    script = f"""
        import os, signal
        from compress.folders import kept_folder
        with kept_folder({str(tmp_path / "out")!r}) as partial:
            (partial / "a").write_text("1")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert done.returncode == -9
    assert os.listdir(tmp_path) == ["out.partial"]
    with kept_folder(tmp_path / "out") as partial:
        assert (partial / "a").read_text() == "1"


@pytest.mark.parametrize(
    "cause",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_named(tmp_path, cause):
    with pytest.raises(DiskFull, match="The disk is full: no room for") as caught, disk_errors(tmp_path):
        raise cause
    assert "finished passes are kept" in caught.value.remedy


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(OSError, match="elsewhere"), disk_errors(tmp_path):
        raise OSError(errno.EIO, "elsewhere")
