"""The whole story over HTTP: a study in, questions, a draft, evidence, a signature, a search."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest

from med3dvlm import load, read_scan
from med3dvlm.data.phantoms import make_study
from med3dvlm.data.phantoms.layouts import dicom
from tests.service.conftest import Running


def test_the_story(service: Running, tmp_path):
    client = service.client
    phantom_series = tmp_path / dicom.write_study(make_study(99, split="test"), tmp_path)
    study = service.upload(phantom_series)
    assert study["state"] == "ready" and study["report_state"] == "none"
    assert study["patient_name"] and study["study_uid"] and study["accession_number"]
    assert study["modality"] == "CT" and study["units"] == "HU" and len(study["shape"]) == 3
    url = f"/api/studies/{study['id']}"

    found = client.get("/api/studies", params={"text": study["patient_id"]}).json()
    assert [one["id"] for one in found["studies"]] == [study["id"]] and found["next"] is None
    volume = client.get(f"{url}/volume.nii.gz")
    assert volume.status_code == 200 and volume.headers["etag"]
    (tmp_path / "volume.nii.gz").write_bytes(volume.content)
    expected = read_scan(phantom_series)
    assert np.array_equal(read_scan(tmp_path / "volume.nii.gz").array, expected.array)
    tag = {"If-None-Match": volume.headers["etag"]}
    assert client.get(f"{url}/volume.nii.gz", headers=tag).status_code == 304
    assert client.get(f"{url}/thumbnail.png").content.startswith(b"\x89PNG")

    asked = client.post(f"{url}/questions", json={"text": "Is there pleural effusion?"}).json()
    events = service.events(asked["job"]["id"])
    kinds = [kind for _, kind, _ in events]
    assert kinds[-1] == "done" and "token" in kinds
    answer = events[-1][2]["result"]
    streamed = "".join(data["text"] for _, kind, data in events if kind == "token")
    model = load("demo")
    assert answer["answer"] == streamed == model.ask(expected, "Is there pleural effusion?")
    assert 0 < answer["confidence"] < 1 and answer["calibrated"] is True
    assert (answer["model"], answer["weights"]) == ("demo", model.fingerprint())
    (earlier,) = client.get(f"{url}/questions").json()["questions"]
    assert earlier == answer

    report = service.draft(study["id"])
    assert report["state"] == "draft" and report["versions"][0]["kind"] == "model"
    drafted = model.report(expected)
    assert " ".join(one["text"] for one in report["sentences"])
    assert report["text"].split() == str(drafted).split()
    assert "phantoms" in report["notice"] and report["signature"] is None
    sentence = report["sentences"][0]["id"]
    job = service.done(client.post(f"{url}/evidence", json={"sentence": sentence}).json()["job"])
    assert job["state"] == "done", job
    z, y, x = job["result"]["peak_voxel"]
    (tmp_path / "map.nii.gz").write_bytes(client.get(job["result"]["map"]).content)
    image = nib.load(tmp_path / "map.nii.gz")  # type: ignore[attr-defined]
    grid = nib.load(tmp_path / "volume.nii.gz")  # type: ignore[attr-defined]
    assert image.shape == grid.shape and np.allclose(image.affine, grid.affine)
    assert image.dataobj[x, y, z] == 100
    peak = (expected.affine @ [x, y, z, 1])[:3]
    assert job["result"]["peak_mm"] == pytest.approx(peak.tolist(), abs=0.02)

    early = client.post(f"{url}/report/sign", json={"version": 1, "name": "Dr. Ada"})
    assert early.status_code == 409 and "neither accepted nor rejected" in early.json()["detail"]
    signed = service.signed(study["id"])
    assert signed["state"] == "final" and signed["signature"]["name"] == "Dr. Ada"
    assert signed["signature"]["authenticated"] is False
    service.idle()
    hits = client.get("/api/search", params={"text": signed["text"][:300]}).json()["hits"]
    assert study["id"] in [hit["study"]["id"] for hit in hits]
    (hit,) = [hit for hit in hits if hit["study"]["id"] == study["id"]]
    assert hit["first_line"] == signed["text"].splitlines()[0]
