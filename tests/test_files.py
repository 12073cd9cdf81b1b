"""Writing files: whole or not at all, and as the process's umask has it."""

from __future__ import annotations

import os

import pytest

from med3dvlm.files import atomic_file, atomic_folder


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


def test_a_file_appears_whole_and_a_failed_one_leaves_nothing(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with atomic_file(path) as temporary:
        temporary.write_text("first")
        assert not path.exists()
    with pytest.raises(RuntimeError), atomic_file(path) as temporary:
        temporary.write_text("second")
        raise RuntimeError
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]


def test_writing_never_touches_the_umask(tmp_path, umask, monkeypatch):
    """It is the whole process's: two threads that set it and set it back can lose it."""
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask was set"))
    with atomic_file(tmp_path / "file") as temporary:
        temporary.write_text("x")
    monkeypatch.undo()
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_a_folder_of_ours_is_replaced_and_anything_else_is_left_alone(tmp_path):
    folder = tmp_path / "maps"
    for name in ("01.nii.gz", "02.nii.gz"):
        with atomic_folder(folder, ours=("[0-9][0-9].nii.gz",)) as temporary:
            (temporary / name).write_text(name)
    assert [path.name for path in folder.iterdir()] == ["02.nii.gz"]
    (folder / "IM0001").write_text("a scan")
    with pytest.raises(ValueError, match=r"maps holds other things \(IM0001\)"):
        with atomic_folder(folder, ours=("[0-9][0-9].nii.gz",)):
            raise AssertionError
    with pytest.raises(ValueError, match="IM0001 is a file"), atomic_folder(folder / "IM0001"):
        raise AssertionError
    assert (folder / "IM0001").read_text() == "a scan" and len(list(tmp_path.iterdir())) == 1
