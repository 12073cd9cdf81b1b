"""Who may what: every role's permissions, in one table."""

from __future__ import annotations

from collections.abc import Iterable

EVERYBODY = frozenset({"studies:read", "metrics:read", "password:own"})

READER = EVERYBODY | {"studies:ask", "reports:draft", "evidence:make", "search"}

ROLES: dict[str, frozenset[str]] = {
    "reader": READER,
    "reviewer": READER
    | {
        "studies:upload",
        "reports:edit",
        "reports:sign",
        "reports:export",
        "reports:send",
        "pacs:query",
        "pacs:import",
        "corrections:export",
    },
    "administrator": EVERYBODY | {"studies:delete", "users:manage", "keys:manage", "audit:read"},
    "service": READER | {"studies:upload", "reports:export", "pacs:query", "pacs:import"},
}

PERMISSIONS = frozenset[str]().union(*ROLES.values())

PERSONS_ONLY = frozenset({"reports:sign", "users:manage", "keys:manage", "password:own"})
"""Never by an API key: a signature is a person's, and a stolen key must not make another."""

PUBLIC = frozenset(
    {
        ("GET", "/api/session"),  # who am I, and how can I sign in
        ("POST", "/api/session"),
        ("DELETE", "/api/session"),
        ("GET", "/api/oidc/login"),
        ("GET", "/api/oidc/callback"),
        ("GET", "/health/live"),
        ("GET", "/health/ready"),
        ("GET", "/openapi.json"),
    }
)
"""Endpoints that need nobody's permission; the page's own files, mounted at /, hold no data."""


def allows(role: str, kind: str, permission: str) -> bool:
    """Whether one of that role, a "user", a "key" or "local", has the permission."""
    if kind == "key" and permission in PERSONS_ONLY:
        return False
    return permission in ROLES.get(role, ())


def permissions_of(role: str, kind: str) -> list[str]:
    """All that one of that role and kind may do, by name."""
    return sorted(one for one in PERMISSIONS if allows(role, kind, one))


def check_role(role: str) -> str:
    """The role itself.

    Raises:
        ValueError: if there is none of that name.
    """
    if role not in ROLES:
        raise ValueError(f"role {role!r} is unknown: use {_either(ROLES)}.")
    return role


def _either(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}"
