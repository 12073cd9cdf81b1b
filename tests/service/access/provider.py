"""A small OpenID provider: real HTTP, real signatures, and wrong answers on demand."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

from joserfc import jwt
from joserfc.jwk import KeySet, RSAKey

CLIENT, SECRET = "med3dvlm", "client-secret"


class OpenIdProvider:
    """Authorization code flow with PKCE (RFC 7636), discovery, and a key set that can change.

    Attributes:
        person: claims of whoever signs in.
        change: claims that are set over the right ones; None takes one out.
        header: of the token, set over the right one.
        signer: key that tokens are signed with; None: the published one.
    """

    def __init__(self):
        self.key = RSAKey.generate_key(2048, {"kid": "one"}, private=True)
        self.person: dict[str, Any] = {
            "sub": "4711",
            "preferred_username": "ann",
            "name": "Dr. Ann Miller",
            "groups": ["staff", "radiologists"],
        }
        self.change: dict[str, Any] = {}
        self.header: dict[str, Any] = {}
        self.signer: Any = None
        self.issuer_said: str | None = None
        self.requests: list[str] = []
        self._codes: dict[str, dict[str, str]] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.issuer = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def authorize(self, query: dict[str, str]) -> str:
        """Sign the person in; the URL that the browser is sent back to."""
        assert query["response_type"] == "code" and query["client_id"] == CLIENT
        assert query["code_challenge_method"] == "S256" and "openid" in query["scope"].split()
        code = secrets.token_urlsafe(16)
        self._codes[code] = query
        return f"{query['redirect_uri']}?{urlencode({'code': code, 'state': query['state']})}"

    def token(self, form: dict[str, str], authorization: str) -> tuple[int, dict[str, Any]]:
        expected = base64.b64encode(f"{CLIENT}:{SECRET}".encode()).decode()
        if authorization != f"Basic {expected}":
            return 401, {"error": "invalid_client"}
        query = self._codes.pop(form.get("code", ""), None)
        digest = hashlib.sha256(form.get("code_verifier", "").encode()).digest()
        if query is None or _base64(digest) != query["code_challenge"]:
            return 400, {"error": "invalid_grant"}
        if form.get("redirect_uri") != query["redirect_uri"]:
            return 400, {"error": "invalid_grant"}
        token = self._id_token(query["nonce"])
        return 200, {"access_token": secrets.token_urlsafe(), "token_type": "Bearer",
                     "expires_in": 60, "id_token": token}  # fmt: skip

    def _id_token(self, nonce: str) -> str:
        now = int(time.time())
        claims = {"iss": self.issuer, "aud": CLIENT, "iat": now, "exp": now + 300, "nonce": nonce}
        claims = claims | self.person | self.change
        claims = {name: value for name, value in claims.items() if value is not None}
        header = {"alg": "RS256", "kid": "one", **self.header}
        if header["alg"] == "HS256":
            return self._signed_with_the_public_key(header, claims)
        return jwt.encode(header, claims, self.signer or self.key, algorithms=["RS256", "none"])

    def _signed_with_the_public_key(self, header: dict[str, Any], claims: dict[str, Any]) -> str:
        """The classic confusion: the public key, used as the secret of an HMAC."""
        signed = ".".join(_base64(json.dumps(part).encode()) for part in (header, claims))
        secret = self.key.as_pem(private=False)
        return f"{signed}.{_base64(hmac.digest(secret, signed.encode(), 'sha256'))}"

    def _handler(provider) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                parts = urlsplit(self.path)
                provider.requests.append(parts.path)
                if parts.path == "/.well-known/openid-configuration":
                    self._say(200, provider.metadata())
                elif parts.path == "/keys":
                    self._say(200, KeySet([provider.key]).as_dict(private=False))
                elif parts.path == "/authorize":
                    query = {name: one[0] for name, one in parse_qs(parts.query).items()}
                    self.send_response(302)
                    self.send_header("Location", provider.authorize(query))
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                else:
                    self._say(404, {})

            def do_POST(self) -> None:
                provider.requests.append(self.path)
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                form = {name: one[0] for name, one in parse_qs(body).items()}
                self._say(*provider.token(form, self.headers.get("Authorization", "")))

            def _say(self, status: int, value: Any) -> None:
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        return Handler

    def metadata(self) -> dict[str, Any]:
        return {
            "issuer": self.issuer_said or self.issuer,
            "authorization_endpoint": f"{self.issuer}/authorize",
            "token_endpoint": f"{self.issuer}/token",
            "jwks_uri": f"{self.issuer}/keys",
        }


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
