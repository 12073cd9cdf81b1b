"""Where the files are: a folder, or what fsspec knows with copies on the disk."""

from __future__ import annotations

import os

import pytest

from med3dvlm.service.storage import open_storage


@pytest.fixture
def remote(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"voxels")
    storage = open_storage(f"memory://{tmp_path.name}", tmp_path / "cache")
    storage.put(source, "studies/1/volume.nii.gz")
    return storage


def test_a_remote_file_is_copied_once_and_forgotten_in_time(remote):
    copy = remote.fetch("studies/1/volume.nii.gz")
    assert copy.read_bytes() == b"voxels" and copy.name.endswith(".nii.gz")
    remote.tend()
    assert remote.fetch("studies/1/volume.nii.gz") == copy
    os.utime(copy, (0, 0))
    remote.tend()
    assert not copy.exists()
    assert remote.fetch("studies/1/volume.nii.gz").read_bytes() == b"voxels"
    with pytest.raises(FileNotFoundError):
        remote.fetch("studies/2/volume.nii.gz")
    assert list(remote.list_keys()) == ["studies/1/volume.nii.gz"]


def test_what_another_process_has_tended_is_no_fault(remote):
    remote.cache.mkdir()
    (remote.cache / "gone").symlink_to("nowhere")  # listed, and not there any more
    remote.tend()
