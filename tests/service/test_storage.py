"""Where the files are: a folder, or what fsspec knows with copies on the disk."""

from __future__ import annotations

import os

import pytest

from med3dvlm.service.storage import StorageError, open_storage

VOLUME = "studies/1/volume.nii.gz"


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source"
    path.write_bytes(b"voxels")
    return path


@pytest.fixture
def url(tmp_path):
    return f"memory://{tmp_path.name}"


@pytest.fixture
def remote(tmp_path, source, url):
    storage = open_storage(url, tmp_path / "cache")
    storage.put(source, VOLUME)
    return storage


def everything(ids):
    return ids


def test_a_remote_file_is_copied_once_and_forgotten_in_time(remote):
    copy = remote.fetch(VOLUME)
    assert copy.read_bytes() == b"voxels" and copy.name.endswith(".nii.gz")
    remote.tend(everything)
    made = copy.stat().st_ino
    assert remote.fetch(VOLUME) == copy and copy.stat().st_ino == made
    os.utime(copy, (0, 0))
    remote.tend(everything)
    assert not copy.exists()
    assert remote.fetch(VOLUME).read_bytes() == b"voxels"
    with pytest.raises(FileNotFoundError):
        remote.fetch("studies/2/volume.nii.gz")
    assert list(remote.list_keys()) == [VOLUME]


def test_what_another_process_has_tended_is_no_fault(remote):
    remote.cache.mkdir()
    (remote.cache / "studies%2F1%2Fgone").symlink_to("nowhere")  # listed, and not there any more
    remote.tend(everything)


def test_a_copy_of_what_another_deleted_is_not_given(remote, url, tmp_path):
    copy = remote.fetch(VOLUME)
    list(remote.list_keys())  # nor does a listing from before hide it
    open_storage(url, tmp_path / "elsewhere").delete("studies/1/")
    with pytest.raises(FileNotFoundError):
        remote.fetch(VOLUME)
    assert not copy.exists()


def test_copies_of_studies_that_are_gone_are_thrown_away(remote, source):
    remote.put(source, "studies/2/volume.nii.gz")
    gone, kept = remote.fetch(VOLUME), remote.fetch("studies/2/volume.nii.gz")
    broken_off = gone.with_name(f".0a1b2c3d{gone.name}")  # a download whose worker was killed
    of_an_older_version = gone.with_name(f"{64 * 'a'}.nii.gz")
    for left in (broken_off, of_an_older_version):
        left.write_bytes(b"voxels")
    remote.tend(lambda ids: ids & {"2"})
    assert list(remote.cache.iterdir()) == [kept]


def test_a_deletion_takes_the_copies_along(remote, source):
    remote.put(source, "studies/12/volume.nii.gz")
    gone, kept = remote.fetch(VOLUME), remote.fetch("studies/12/volume.nii.gz")
    remote.delete("studies/1/")
    assert not gone.exists() and kept.exists()
    assert list(remote.list_keys()) == ["studies/12/volume.nii.gz"]
    remote.delete("studies/1/")  # again, and of what was never there


def test_a_deletion_that_fails_is_said_and_can_be_done_again(tmp_path, source):
    """A link in place of a folder, which is not followed, stands for all that cannot be removed."""
    files, disk = tmp_path / "files", tmp_path / "another disk"
    storage = open_storage(str(files), tmp_path / "cache")
    storage.put(source, VOLUME)
    folder = (files / VOLUME).parent
    folder.rename(disk)
    folder.symlink_to(disk)
    with pytest.raises(StorageError, match="studies/1/ could not all be removed") as raised:
        storage.delete("studies/1/")
    assert str(tmp_path) not in str(raised.value)
    folder.unlink()
    disk.rename(folder)
    storage.delete("studies/1/")
    assert list(storage.list_keys()) == []
    storage.delete("studies/1/")


def test_so_is_one_of_a_remote_storage(tmp_path, source, monkeypatch):
    storage = open_storage(f"file://{tmp_path}/files", tmp_path / "cache")
    storage.put(source, VOLUME)
    copy = storage.fetch(VOLUME)
    monkeypatch.chdir(tmp_path / "files" / "studies" / "1")  # which fsspec does not remove
    with pytest.raises(StorageError, match="studies/1/ could not all be removed"):
        storage.delete("studies/1/")
    assert copy.exists()
    monkeypatch.chdir(tmp_path)
    storage.delete("studies/1/")
    assert list(storage.list_keys()) == [] and not copy.exists()
