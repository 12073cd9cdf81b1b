"""Role × endpoint, every cell, from the real app's own table of routes.

The table here is written out, not taken from `permissions.py`: it is what was meant. An endpoint
that is not in it fails.
"""

from __future__ import annotations

import pytest

from med3dvlm.service.access.gate import rules_of
from med3dvlm.service.access.permissions import PERMISSIONS, PUBLIC, ROLES

R, V, A, S = "reader", "reviewer", "administrator", "service"
ALL = {R, V, A, S}
PERSON = "person"  # and not by a key

MEANT: dict[str, set[str]] = {
    "GET /api/studies": ALL,
    "POST /api/studies": {V, S},
    "GET /api/studies/{study_id}": ALL,
    "DELETE /api/studies/{study_id}": {A},
    "GET /api/studies/{study_id}/volume.nii.gz": ALL,
    "GET /api/studies/{study_id}/thumbnail.png": ALL,
    "GET /api/studies/{study_id}/questions": ALL,
    "POST /api/studies/{study_id}/questions": {R, V, S},
    "GET /api/studies/{study_id}/suggestions": ALL,
    "POST /api/studies/{study_id}/report": {R, V, S},
    "GET /api/studies/{study_id}/report": ALL,
    "PUT /api/studies/{study_id}/report": {V},
    "POST /api/studies/{study_id}/report/sign": {V, PERSON},
    "POST /api/studies/{study_id}/report/addendum": {V, PERSON},
    "GET /api/studies/{study_id}/report/versions/{number}": ALL,
    "GET /api/studies/{study_id}/report/changes": ALL,
    "GET /api/corrections.jsonl": {V},
    "POST /api/studies/{study_id}/evidence": {R, V, S},
    "GET /api/evidence/{job_id}/map.nii.gz": ALL,
    "GET /api/search": {R, V, S},
    "GET /api/jobs": ALL,
    "GET /api/jobs/{job_id}": ALL,
    "DELETE /api/jobs/{job_id}": {R, V, S},
    "GET /api/jobs/{job_id}/events": ALL,
    "GET /api/model": ALL,
    "GET /v1/models": {R, V, S},
    "POST /v1/chat/completions": {R, V, S},
    "GET /api/studies/{study_id}/export": {V, S},
    "GET /api/studies/{study_id}/evidence/{job_id}/export": {V, S},
    "POST /api/studies/{study_id}/send": {V},
    "GET /api/pacs": {V, S},
    "GET /api/pacs/studies": {V, S},
    "GET /api/pacs/studies/{study_uid}/series": {V, S},
    "POST /api/pacs/import": {V, S},
    "GET /api/pacs/imports": {V, S},
    "GET /metrics": ALL,
    "PUT /api/session/password": ALL | {PERSON},
    "GET /api/users": {A, PERSON},
    "POST /api/users": {A, PERSON},
    "PATCH /api/users/{name}": {A, PERSON},
    "DELETE /api/users/{name}": {A, PERSON},
    "GET /api/keys": {A, PERSON},
    "POST /api/keys": {A, PERSON},
    "DELETE /api/keys/{id}": {A, PERSON},
    "GET /api/audit": {A},
    "POST /api/audit/verify": {A},
}
MEANT_PUBLIC = {
    "GET /api/session",
    "POST /api/session",
    "DELETE /api/session",
    "GET /api/oidc/login",
    "GET /api/oidc/callback",
    "GET /health/live",
    "GET /health/ready",
    "GET /openapi.json",
}
NOTHING = {
    **dict.fromkeys(("study_id", "job_id", "id"), "0" * 32),
    "study_uid": "1.2.3",
    "name": "nobody",
    "number": 1,
}
"""What paths are filled with: things that are not there."""


@pytest.fixture(scope="module")
def keys(place):
    return {role: place.with_key(f"matrix-{role}", role) for role in ROLES}


def test_every_endpoint_is_in_the_matrix(place):
    there = {f"{rule.method} {rule.path}" for rule in rules_of(place.app)}
    assert there == set(MEANT) | MEANT_PUBLIC
    assert {" ".join(one) for one in PUBLIC} == MEANT_PUBLIC


def test_every_permission_is_some_endpoints(place):
    assert {rule.permission for rule in rules_of(place.app)} - {None} == PERMISSIONS


def ask(client, endpoint):
    """A request that does nothing where it is let in: what it is about is not there."""
    method, path = endpoint.split()
    return client.request(method, path.format(**NOTHING))


@pytest.mark.parametrize("endpoint", MEANT)
def test_users(place, endpoint):
    for role in sorted(ROLES):
        answer = ask(place.signed_in(role), endpoint)
        if role in MEANT[endpoint]:
            assert answer.status_code not in (401, 403), (role, answer.text)
        else:
            assert answer.status_code == 403, role
            assert answer.json()["detail"].startswith(f"The role {role} may not do this")


@pytest.mark.parametrize("endpoint", MEANT)
def test_keys(keys, endpoint):
    for role, client in keys.items():
        answer = ask(client, endpoint)
        if role in MEANT[endpoint] and PERSON not in MEANT[endpoint]:
            assert answer.status_code not in (401, 403), (role, answer.text)
        else:
            assert answer.status_code == 403, role


@pytest.mark.parametrize("endpoint", MEANT)
def test_nobody(place, endpoint):
    assert ask(place.client(), endpoint).status_code == 401


@pytest.mark.parametrize("endpoint", sorted(MEANT_PUBLIC))
def test_public_ones(place, endpoint):
    assert ask(place.client(), endpoint).status_code not in (401, 403)


@pytest.mark.parametrize(
    "path",
    ["/api/studies/", "//api/studies", "/API/studies", "/api/studies%2F", "/api/./studies",
     "/api/x/../studies", "/api/studies;x", "/%61pi/studies", "/api/studies\u00a0"],
)  # fmt: skip
def test_no_other_spelling_leads_around_the_gate(place, path):
    answer = place.client().get(path, follow_redirects=True)
    assert answer.status_code in (401, 404)
