"""The pictures of docs/workstation.md, of a running server that has no studies yet.

    med3dvlm serve --data shots & python benchmarks/screenshots.py http://localhost:8000

Puts generated phantoms in, drafts and signs some, and writes docs/images/workstation-*.png. Needs
Chromium and Playwright; draws volumes in software.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from playwright.sync_api import Page, sync_playwright

from med3dvlm.data.phantoms import make_study, write_study

IMAGES = Path(__file__).parents[1] / "docs/images"
ARGUMENTS = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
SIZE = {"width": 1440, "height": 900}
STUDIES, SIGNED, DRAFTED = range(8), (1, 4, 7), (2, 5)
READ = 5  # the study whose reading is shown
WAIT_S = 600


def main(url: str) -> None:
    client = httpx.Client(base_url=url, timeout=60)
    ids = {index: upload(client, index) for index in STUDIES}
    for index in (*SIGNED, *DRAFTED):
        draft(client, ids[index], sign=index in SIGNED)
    with sync_playwright() as playwright:
        chromium = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        context = browser.new_context(base_url=url, viewport=SIZE)
        context.set_default_timeout(1000 * WAIT_S)
        page = context.new_page()
        worklist(page)
        reading(page, ids[READ])
        search(page)
        browser.close()


def upload(client: httpx.Client, index: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        write_study(make_study(index, split="test"), folder, layout="dicom")
        slices = sorted(Path(folder).rglob("IM*"))
        parts = [("files", (file.name, file.read_bytes())) for file in slices]
    study = client.post("/api/studies", files=parts).raise_for_status().json()["id"]
    wait(client, f"/api/studies/{study}", "ready")
    return study


def draft(client: httpx.Client, study: str, *, sign: bool) -> None:
    path = f"/api/studies/{study}/report"
    job = client.post(path, json={"method": "generate"}).raise_for_status().json()["job"]
    wait(client, f"/api/jobs/{job['id']}", "done")
    if not sign:
        return
    report = client.get(path).json()
    sentences = [{"id": one["id"], "text": one["text"]} for one in report["sentences"]]
    body = {"base_version": report["version"], "sentences": sentences}
    version = client.put(path, json=body).raise_for_status().json()["version"]
    name = {"version": version, "name": "Dr. Maria Weiss"}
    client.post(f"{path}/sign", json=name).raise_for_status()


def wait(client: httpx.Client, path: str, state: str) -> dict[str, Any]:
    until = time.monotonic() + WAIT_S
    while time.monotonic() < until:
        found = client.get(path).raise_for_status().json()
        if found["state"] == state:
            return found
        time.sleep(0.2)
    sys.exit(f"{path} did not become {state}: {found}")


def worklist(page: Page) -> None:
    page.goto("/")
    page.locator(".studies tbody tr").nth(5).wait_for()
    page.wait_for_load_state("networkidle")
    for _ in range(3):
        page.keyboard.press("j")
    save(page, "worklist")


def reading(page: Page, study: str) -> None:
    page.goto(f"/#/study/{study}")
    page.locator(".view .slice:not(:empty)").first.wait_for()
    page.locator(".sentence").nth(2).wait_for()
    page.keyboard.press("q")
    for key in "jjjxyykkkk":
        page.keyboard.press(key)
    page.keyboard.press("Enter")
    page.locator(".scale").wait_for()
    save(page, "reading")


def search(page: Page) -> None:
    page.goto("/#/search?text=left pleural effusion")
    page.locator(".hit").nth(5).wait_for()
    page.wait_for_load_state("networkidle")
    save(page, "search")


def save(page: Page, name: str) -> None:
    page.wait_for_timeout(1500)
    page.screenshot(path=IMAGES / f"workstation-{name}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
