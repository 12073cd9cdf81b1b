"""Who asks, and what an endpoint asks of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastapi import HTTPException, Request

from med3dvlm.service.access.permissions import PERMISSIONS, allows

Kind = Literal["user", "key", "local"]


@dataclass(frozen=True)
class Identity:
    """Who a request comes from.

    Attributes:
        name: of the account, the key, or "local" on a server without accounts.
        display_name: as a signature shows it.
        kind: "user" signed in, "key" is a program, "local" is whoever sits at this machine.
        address: where the request comes from; "" outside a request.
    """

    name: str
    display_name: str
    role: str
    kind: Kind
    address: str = ""

    def may(self, permission: str) -> bool:
        return allows(self.role, self.kind, permission)


class Require:
    """A dependency: the caller's `Identity`, if it has the permission.

    The gate (`gate.py`) reads the permission off the route and decides before the body is read;
    here the same is asked again, so that an endpoint is shut also where the gate is missing.
    """

    def __init__(self, permission: str):
        if permission not in PERMISSIONS:
            raise ValueError(f"permission {permission!r} is no role's: see access/permissions.py.")
        self.permission = permission

    def __call__(self, request: Request) -> Identity:
        identity: Identity | None = request.scope.get("state", {}).get("identity")
        if identity is None:
            raise HTTPException(401, "Sign in first.")
        if not identity.may(self.permission):
            raise HTTPException(403, forbidden(identity, self.permission))
        return identity


def require(permission: str) -> Require:
    """`identity: Annotated[Identity, Depends(require("studies:read"))]`."""
    return Require(permission)


def forbidden(identity: Identity, permission: str) -> str:
    if identity.kind == "key" and allows(identity.role, "user", permission):
        return f"An API key may not do this ({permission}): it takes a person who is signed in."
    return f"The role {identity.role} may not do this ({permission})."
