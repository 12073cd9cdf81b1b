"""Hostile uploads: refused in one sentence, or harmless."""

from __future__ import annotations

import io
import os
import random
import stat
import struct
import zipfile
from pathlib import Path

import pydicom
import pytest

from med3dvlm.data.phantoms import make_study
from med3dvlm.data.phantoms.layouts import dicom, nifti
from med3dvlm.scan import read_scan
from med3dvlm.service.settings import load_settings
from med3dvlm.service.uploads import Part, UploadRefused, _new_folder, accept, safe_name

SCRIPT = "<script>alert(1)</script>"
FILE_PART = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'


@pytest.fixture(scope="module")
def volume(tmp_path_factory) -> bytes:
    """A small NIfTI file, gzipped."""
    folder = tmp_path_factory.mktemp("volume")
    return (folder / nifti.write_study(make_study(0, shape=(16, 32, 32)), folder)).read_bytes()


@pytest.fixture(scope="module")
def slices(tmp_path_factory) -> list[bytes]:
    """The files of a small DICOM series."""
    folder = tmp_path_factory.mktemp("slices")
    dicom.write_study(make_study(0, shape=(16, 32, 32)), folder)
    return [file.read_bytes() for file in sorted(folder.rglob("IM*"))]


def put(tmp_path: Path, files: dict[str, bytes], most: int = 5000):
    """What becomes of these files, given under these names."""
    parts = []
    for number, (name, data) in enumerate(files.items()):
        path = tmp_path / f"part{number}"
        path.write_bytes(data)
        parts.append(Part(safe_name(name), path))
    return accept(parts, tmp_path / "checked", most)


def zipped(members: dict[str | zipfile.ZipInfo, bytes], method=zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def info(name: str, mode: int = 0) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    entry.external_attr = mode << 16
    return entry


# --- what is taken --------------------------------------------------------------------------


def test_a_volume(tmp_path, volume):
    taken = put(tmp_path, {"folder/CT chest.nii.gz": volume})
    assert taken.name == "CT chest.nii.gz"
    assert read_scan(taken.scan).shape == (16, 32, 32)


def test_the_files_of_a_series(tmp_path, slices):
    taken = put(tmp_path, {f"IM{n}": data for n, data in enumerate(slices)})
    assert taken.scan == taken.folder and len(list(taken.folder.iterdir())) == len(slices)
    assert read_scan(taken.scan).shape == (16, 32, 32)


def test_a_zip_as_a_patients_cd_is(tmp_path, slices):
    """Programs, pictures and archives beside the images stay packed."""
    members = {f"DICOM/IM{n}": data for n, data in enumerate(slices)}
    members |= {"viewer.exe": b"MZ" + bytes(99), "AUTORUN.INF": b"[autorun]", "jre.jar": b"PK\3\4"}
    taken = put(tmp_path, {"cd.zip": zipped(members)})
    assert read_scan(taken.scan).shape == (16, 32, 32)
    assert len(list(taken.folder.iterdir())) == len(slices)
    assert taken.notes == ("left out 3 files that are neither DICOM nor NIfTI",)


def test_a_zipped_volume(tmp_path, volume):
    taken = put(tmp_path, {"study.zip": zipped({"a/ct.nii.gz": volume})})
    assert read_scan(taken.scan).shape == (16, 32, 32)


# --- what is not ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["../../etc/passwd", "/etc/passwd", "a/../../b.nii", "..\\..\\windows\\b.nii", "C:\\b.nii",
     "C:b.nii", "\\\\host\\share\\b.nii", "..", "", "a\0.nii", "a\n.nii", "a\x1b[2J.nii",
     "x" * 2000, "\u202egnp.nii"],
)  # fmt: skip
def test_names_that_lead_elsewhere(tmp_path, volume, name):
    with pytest.raises(UploadRefused):
        put(tmp_path, {name: volume})


@pytest.mark.parametrize(
    "name", ["../../../tmp/evil.dcm", "/tmp/evil.dcm", "a/../../evil.dcm", "..\\evil.dcm", "C:\\x"]
)
def test_names_in_a_zip_that_lead_elsewhere(tmp_path, slices, name):
    with pytest.raises(UploadRefused, match="leads out of its folder"):
        put(tmp_path, {"study.zip": zipped({"good.dcm": slices[0], info(name): slices[1]})})


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFSOCK])
def test_links_and_devices_in_a_zip(tmp_path, slices, kind):
    members = {"a.dcm": slices[0], info("b.dcm", kind | 0o777): b"/etc/passwd"}
    with pytest.raises(UploadRefused, match="link or device"):
        put(tmp_path, {"study.zip": zipped(members)})


def test_a_bomb_of_one_member(tmp_path, slices):
    bomb = zipped({"a.dcm": slices[0] + bytes(80 * 2**20)})
    assert len(bomb) < 2**20
    with pytest.raises(UploadRefused, match="decompression bomb") as caught:
        put(tmp_path, {"study.zip": bomb})
    assert caught.value.status_code == 413
    assert not list((tmp_path / "checked").iterdir())  # nothing was unpacked


def test_a_bomb_of_many_members(tmp_path, slices):
    members = {f"{n}.dcm": slices[0] + bytes(20 * 2**20) for n in range(14)}
    with pytest.raises(UploadRefused, match="decompression bomb"):
        put(tmp_path, {"study.zip": zipped(members)})


def test_a_bomb_that_denies_its_size(tmp_path, slices):
    """The table of contents says 1000 bytes; there are 80 MB."""
    data = bytearray(zipped({"a.dcm": slices[0] + bytes(80 * 2**20)}))
    entry = data.rindex(b"PK\x01\x02")
    data[entry + 24 : entry + 28] = struct.pack("<I", 1000)
    with pytest.raises(UploadRefused, match="cannot be read"):
        put(tmp_path, {"study.zip": bytes(data)})
    written = sum(file.stat().st_size for file in (tmp_path / "checked").iterdir())
    assert written <= 1000


def test_members_that_share_their_bytes(tmp_path, slices):
    """The better zip bomb: every entry of the table points at the same compressed data."""
    packed = zipped({"0.dcm": slices[0] + bytes(60 * 2**20)})
    start = packed.index(b"PK\x01\x02")
    entry, end = packed[start : packed.index(b"PK\x05\x06")], packed[packed.index(b"PK\x05\x06") :]
    count = 200
    end = end[:8] + struct.pack("<HHI", count, count, count * len(entry)) + end[16:]
    with pytest.raises(UploadRefused, match="decompression bomb"):
        put(tmp_path, {"study.zip": packed[:start] + entry * count + end})


def test_archives_in_archives_are_not_opened(tmp_path, slices):
    inner = zipped({"a.dcm": slices[0]})
    with pytest.raises(UploadRefused, match="holds no scan"):
        put(tmp_path, {"study.zip": zipped({"inner.zip": inner, "more.dcm": inner})})


def test_too_many_members(tmp_path, slices):
    members = {f"{n}.txt": b"" for n in range(50)}
    with pytest.raises(UploadRefused, match="more than 20 members"):
        put(tmp_path, {"study.zip": zipped(members)}, most=20)
    (tmp_path / "checked").rmdir()
    with pytest.raises(UploadRefused, match="More than 3 files"):
        put(tmp_path, {f"{n}.dcm": slices[n] for n in range(5)}, most=3)


def test_a_table_of_contents_that_fills_the_memory(tmp_path, slices):
    data = bytearray(zipped({"a.dcm": slices[0]}))
    padding = bytes(40 * 2**20)
    end = data.rindex(b"PK\x05\x06")
    data[end:end] = padding
    end += len(padding)
    start = data.index(b"PK\x01\x02")
    data[end + 12 : end + 20] = struct.pack("<II", end - start, start)
    with pytest.raises(UploadRefused, match="table of contents is too large"):
        put(tmp_path, {"study.zip": bytes(data)})


def test_encrypted_and_unusual_zips(tmp_path, slices):
    data = bytearray(zipped({"a.dcm": slices[0]}))
    data[data.rindex(b"PK\x01\x02") + 8] |= 1
    with pytest.raises(UploadRefused, match="encrypted"):
        put(tmp_path, {"study.zip": bytes(data)})
    (tmp_path / "checked").rmdir()
    with pytest.raises(UploadRefused, match="compression is unusual"):
        put(tmp_path, {"study.zip": zipped({"a.dcm": slices[0]}, zipfile.ZIP_LZMA)})


@pytest.mark.parametrize(
    "start",
    [b"MZ\x90\0", b"\x7fELF\2\1\1", b"#!/bin/sh\nrm -rf /\n", b"%PDF-1.7\n", b"PK\3\4",
     b"<html><script>alert(1)</script>", b"  \n<?php system('id'); ?>", b"<svg onload=alert(1)>",
     b"GIF89a", b"\xcf\xfa\xed\xfe"],
)  # fmt: skip
def test_preambles_of_other_formats(tmp_path, slices, start):
    polyglot = start.ljust(128, b"\0") + slices[0][128:]
    with pytest.raises(UploadRefused):
        put(tmp_path, {"a.dcm": polyglot})


def test_a_tiff_preamble_is_allowed(tmp_path, slices):
    """PS3.10, 7.1: so that programs for TIFF read the same file."""
    files = {f"{n}": b"II*\0".ljust(128, b"\0") + one[128:] for n, one in enumerate(slices)}
    assert read_scan(put(tmp_path, files).scan).shape == (16, 32, 32)


@pytest.mark.parametrize("kind", ["dicom", "nifti", "in a zip"])
def test_images_that_are_archives_too(tmp_path, slices, volume, kind):
    hidden = zipped({"payload.exe": b"MZ"})
    files = {
        "dicom": {"a.dcm": slices[0] + hidden},
        "nifti": {"a.nii.gz": volume + hidden},
        "in a zip": {"a.zip": zipped({"a.dcm": slices[0] + hidden}, zipfile.ZIP_STORED)},
    }[kind]
    with pytest.raises(UploadRefused, match="an image and an archive at once"):
        put(tmp_path, files)


def test_pixels_that_look_like_the_end_of_a_zip_are_no_archive(tmp_path, slices):
    files = {f"{n}": one for n, one in enumerate(slices)}
    files["0"] = slices[0] + b"PK\x05\x06" + bytes(18)
    assert put(tmp_path, files).scan.is_dir()


def test_several_studies_or_none(tmp_path, slices, volume):
    for files, reason in (
        ({}, "No file came"),
        ({"readme.txt": b"hello", "run.exe": b"MZ"}, "holds no scan"),
        ({"a.nii.gz": volume, "b.nii.gz": volume}, "2 NIfTI and 0 DICOM"),
        ({"a.nii.gz": volume, "b.dcm": slices[0]}, "1 NIfTI and 1 DICOM"),
        ({"empty.nii": b""}, "holds no scan"),
    ):
        with pytest.raises(UploadRefused, match=reason):
            put(tmp_path, files)
        for file in (tmp_path / "checked").glob("*"):
            file.unlink()
        if (tmp_path / "checked").exists():
            (tmp_path / "checked").rmdir()


def test_a_thousand_broken_zips(tmp_path, slices):
    """Whatever the bytes: taken, or refused; nothing else, and nothing outside the folder."""
    good = zipped({f"{n}.dcm": one for n, one in enumerate(slices[:3])})
    dice = random.Random(0)
    path = tmp_path / "part"
    for number in range(1000):
        broken = bytearray(good)
        for _ in range(dice.randint(1, 8)):
            where = dice.choice([dice.randrange(len(broken)), dice.randrange(-300, 0)])
            broken[where] = dice.choice([0, 1, 0x7F, 0x80, 0xFF, dice.randrange(256)])
        path.write_bytes(broken[: dice.choice([len(broken), dice.randrange(len(broken))])])
        folder = tmp_path / f"checked{number}"
        try:
            accept([Part("a.zip", path)], folder, 100)
        except UploadRefused as error:
            assert error.detail
        assert all(file.name.endswith((".dcm", ".nii")) for file in folder.rglob("*"))
    assert {entry.name[:7] for entry in tmp_path.iterdir()} == {"part", "checked"}


def test_an_upload_that_ends_beside_another_is_no_fault(tmp_path):
    forgotten = tmp_path / "incoming" / "forgotten"
    forgotten.mkdir(parents=True)
    os.utime(forgotten, (0, 0))
    (tmp_path / "incoming" / "ended").symlink_to("nowhere")  # listed, and not there any more
    folder = _new_folder(load_settings(data=tmp_path, environment={}), 0)
    assert (folder / "parts").is_dir() and not forgotten.exists()


# --- through the service --------------------------------------------------------------------


def send(service, files, **options):
    parts = [("files", (name, data)) for name, data in files.items()]
    return service.client.post("/api/studies", files=parts, **options)


def incoming(service) -> list[Path]:
    return list((service.core.settings.data / "incoming").iterdir())


def test_the_service_refuses_and_keeps_nothing(service, slices):
    for files, status in (
        ({"../../../etc/cron.d/x": slices[0]}, 422),
        ({"study.zip": zipped({info("../../x.dcm"): slices[0]})}, 422),
        ({"study.zip": zipped({"a.dcm": slices[0] + bytes(80 * 2**20)})}, 413),
        ({"a.dcm": b"MZ".ljust(128, b"\0") + slices[0][128:]}, 422),
        ({"a.html": SCRIPT.encode()}, 422),
    ):
        answer = send(service, files)
        assert answer.status_code == status, answer.text
        assert list(answer.json()) == ["detail"]
        assert answer.headers["Content-Type"] == "application/json"
    assert incoming(service) == []


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"", "multipart/form-data; boundary=b", 400),
        (b"", "multipart/form-data", 415),
        (b"{}", "application/json", 415),
        (b"garbage", "multipart/form-data; boundary=b", 400),
        (b"--b\r\nContent-Disposition: form-data; name=\"other\"\r\n\r\nx\r\n--b--", None, 422),
        (b"--b\r\nContent-Disposition: form-data; name=\"files\"\r\n\r\nx\r\n--b--", None, 422),
        (b"--b\r\nContent-Type: a/b\r\n\r\nx\r\n--b--", None, 422),
        (FILE_PART + b"x", None, 400),
        (b"--b\r\n" + b"X: y\r\n" * 10_000 + b"\r\n", None, 400),
        (b"--b\r\nX: " + b"y" * 2**20 + b"\r\n\r\n", None, 400),
    ],
)  # fmt: skip
def test_bodies_that_are_no_form(service, body, kind, status):
    headers = {"Content-Type": kind or "multipart/form-data; boundary=b"}
    answer = service.client.post("/api/studies", content=body, headers=headers)
    assert answer.status_code == status, answer.text
    assert incoming(service) == []


def test_scripts_in_dicom_text_come_back_as_text(service, slices, tmp_path):
    """As JSON that no browser takes for a page, letter by letter."""
    for number, data in enumerate(slices):
        dataset = pydicom.dcmread(io.BytesIO(data))
        dataset.PatientName = SCRIPT
        dataset.PatientID = '"><img src=x onerror=alert(1)>'
        dataset.StudyDescription = dataset.SeriesDescription = SCRIPT
        dataset.save_as(tmp_path / f"{number}.dcm")
    study = service.upload(tmp_path)
    assert study["state"] == "ready"
    assert SCRIPT in (study["patient_name"], study["description"])
    for path in ("/api/studies", f"/api/studies/{study['id']}", "/api/studies?text=script"):
        answer = service.client.get(path)
        assert SCRIPT in str(answer.json())
        _is_no_page(answer)


def test_scripts_in_report_text_come_back_as_text(service, phantom_files):
    study = service.upload(phantom_files[3])["id"]
    report = service.draft(study, "template")
    body = {
        "base_version": report["version"],
        "sentences": [{"text": f"Lungs clear {SCRIPT}.", "status": "added"}],
    }
    answer = service.client.put(f"/api/studies/{study}/report", json=body)
    assert answer.status_code == 200, answer.text
    for path in ("", "/changes", f"/versions/{answer.json()['version']}"):
        answer = service.client.get(f"/api/studies/{study}/report{path}")
        assert SCRIPT in str(answer.json())
        _is_no_page(answer)
    refused = service.client.get("/api/search", params={"text": SCRIPT, "where": SCRIPT})
    _is_no_page(refused)


def _is_no_page(answer):
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
