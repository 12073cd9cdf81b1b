"""The page in a browser, against the service as it runs: Chromium, draws volumes in software."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from med3dvlm.service.access import Identity
from med3dvlm.service.access.users import add_user
from med3dvlm.service.app import create_app
from med3dvlm.service.settings import load_settings

CHROMIUM = os.environ.get("MED3DVLM_CHROMIUM") or shutil.which("chromium")
ARGUMENTS = [
    "--no-sandbox",  # Chromium refuses root otherwise
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--ignore-gpu-blocklist",
]
NAME, SHOWN, PASSWORD = "weiss", "Dr. Maria Weiss", "quiet lungs breathe slowly"
WAIT_MS = 60_000
SIZE = {"width": 1280, "height": 720}


@dataclass(frozen=True)
class Site:
    """Where the service is, and a reviewer's account on it."""

    url: str
    name: str = NAME
    shown: str = SHOWN
    password: str = PASSWORD

    def client(self) -> httpx.Client:
        """Signed in as the reviewer."""
        who = {"name": self.name, "password": self.password}
        session = httpx.post(f"{self.url}/api/session", json=who).raise_for_status()
        headers = {"X-CSRF-Token": session.json()["csrf"]}
        return httpx.Client(base_url=self.url, cookies=session.cookies, headers=headers, timeout=60)

    def upload(self, path: Path) -> dict:
        """Put a file, or the files of a folder, in; the study when it is ready."""
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        parts = [("files", (f.name, f.read_bytes())) for f in files if f.is_file()]
        with self.client() as client:
            study = client.post("/api/studies", files=parts).raise_for_status().json()
            until = time.monotonic() + WAIT_MS / 1000
            while study["state"] == "received" and time.monotonic() < until:
                time.sleep(0.1)
                study = client.get(f"/api/studies/{study['id']}").json()
        assert study["state"] == "ready", study
        return study


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Iterator[Site]:
    """A server of its own on a free port, with one reviewer's account."""
    with serving(tmp_path_factory.mktemp("site")) as site:
        yield site


@contextmanager
def serving(data: Path, **settings: Any) -> Iterator[Site]:
    # all tests sign in from one address, on a quick machine more often than a person may
    limits = {"sign_ins_per_min": 1000, "guest_requests_per_min": 10**6, "requests_per_min": 10**6}
    app = create_app(load_settings(data=data, environment={}, **limits, **settings))
    add_user(
        app.state.database,
        Identity("test", "test", "administrator", "local"),
        NAME,
        role="reviewer",
        password=PASSWORD,
        display_name=SHOWN,
        password_length=app.state.settings.password_length,
    )
    config = uvicorn.Config(app, port=0, log_level="warning", server_header=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + WAIT_MS / 1000
    while not server.started and time.monotonic() < until:
        time.sleep(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield Site(f"http://localhost:{port}")
    server.should_exit = True
    thread.join(20)


@pytest.fixture(scope="session")
def browser():
    if CHROMIUM is None:
        if os.environ.get("CI"):
            pytest.fail("CI needs Chromium: apt-get install chromium")
        pytest.skip("Chromium is not installed: apt-get install chromium")
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=WAIT_MS)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, site):
    """A fresh page of nobody's session; whatever goes wrong in it fails the test."""
    with watched(browser, site) as page:
        yield page


@contextmanager
def watched(browser, site: Site):
    context = browser.new_context(base_url=site.url, viewport=SIZE, accept_downloads=True)
    context.set_default_timeout(WAIT_MS)
    page, faults = context.new_page(), []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda line: faults.append(line.text) if _is_fault(line) else None)
    page.on("dialog", lambda dialog: (faults.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda sent: _is_outside(sent.url, site.url) and faults.append(sent.url))
    yield page
    context.close()
    assert not faults


def _is_fault(line) -> bool:
    """Refusals are shown as toasts; only a test disconnects the browser."""
    known = ("status of 4", "ERR_INTERNET_DISCONNECTED")
    return line.type == "error" and not any(text in line.text for text in known)


def _is_outside(url: str, site: str) -> bool:
    return not url.startswith((site, "data:", "blob:"))


@pytest.fixture
def signed_in(page, site):
    """The worklist."""
    sign_in(page, site)
    return page


def sign_in(page, site: Site) -> None:
    page.goto("/")
    page.get_by_label("Name").fill(site.name)
    page.get_by_label("Password").fill(site.password)
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="Worklist").wait_for()


def open_study(page, study: dict) -> None:
    """The study's page, once its images are drawn."""
    page.goto(f"/#/study/{study['id']}")
    page.locator(".view .slice:not(:empty)").first.wait_for()


@pytest.fixture(scope="session")
def study(site, phantom_files) -> dict:
    """A study that is there to be looked at: no test signs it."""
    return site.upload(phantom_files[1])
