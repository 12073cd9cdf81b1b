"""Access put in front of an app."""

from __future__ import annotations

from fastapi import FastAPI

from med3dvlm.service.access.gate import Gate, rules_of
from med3dvlm.service.access.headers import SecurityHeaders
from med3dvlm.service.access.limits import Buckets
from med3dvlm.service.access.oidc import Provider


def install(app: FastAPI) -> None:
    """Put the endpoints of access in, and the gate in front; the last thing that is done to `app`.

    `app.state` must have `settings` and `database`.

    Raises:
        UndeclaredError: for an endpoint that does not say who may use it.
        SettingsError: for settings of OpenID that do not belong together.
    """
    settings = app.state.settings
    app.state.oidc = Provider(settings) if settings.oidc_issuer else None
    app.state.sign_ins = Buckets(settings.sign_ins_per_min)
    app.add_middleware(Gate, rules=rules_of(app), settings=settings, database=app.state.database)
    app.add_middleware(SecurityHeaders)
    if settings.trusted_proxies:
        from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

        app.add_middleware(ProxyHeadersMiddleware, trusted_hosts=list(settings.trusted_proxies))
