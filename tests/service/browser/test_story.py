"""A reader's day, with mouse and keys, from signing in to the exported report."""

from __future__ import annotations

import io
import re

import numpy as np
from PIL import Image
from playwright.sync_api import Page, expect
from pydicom import dcmread

from tests.service.browser.conftest import Site


def test_from_signing_in_to_the_exported_report(page: Page, site: Site, phantom_series):
    page.goto("/")
    expect(page.get_by_text("Not a medical device")).to_be_visible()
    page.get_by_label("Name").fill(site.name)
    page.get_by_label("Password").fill("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).not_to_be_empty()
    page.get_by_label("Password").fill(site.password)
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Worklist")).to_be_visible()

    files = [str(file) for file in sorted(phantom_series.rglob("*")) if file.is_file()]
    page.locator("input[type=file]:not([webkitdirectory])").set_input_files(files)
    row = page.locator("tr", has_text=str(dcmread(files[0]).PatientID))
    expect(row.get_by_text("No report")).to_be_visible()
    row.locator("a.name").focus()
    page.keyboard.press("Enter")
    axial = page.locator(".view", has_text="Axial").locator(".slice")
    expect(axial).to_have_text(re.compile(r"\d+ / \d+"))

    _look(page, axial)
    _ask(page, site)
    _report(page, site)
    _find_and_export(page)


def _look(page: Page, axial) -> None:
    before = int(axial.inner_text().split()[0])
    page.keyboard.press("ArrowUp")
    page.keyboard.press("PageUp")
    expect(axial).to_have_text(re.compile(rf"^{before + 6} / "))
    page.keyboard.press("2")
    expect(page.get_by_role("button", name="Lung")).to_have_attribute("aria-pressed", "true")
    expect(page.locator(".readout")).to_contain_text("Lung · L −600  W 1500")
    page.locator(".images canvas").hover(position={"x": 30, "y": 30})
    expect(page.locator(".readout strong")).to_have_text(re.compile(r"^[−\d]+ HU$"))
    page.keyboard.press("q")
    expect(page.locator(".view")).to_have_count(4)
    page.keyboard.press("m")
    expect(page.locator(".view")).to_have_count(3)


def _ask(page: Page, site: Site) -> None:
    page.keyboard.press("g")
    page.keyboard.type("Is there pleural effusion?")
    page.keyboard.press("Enter")
    answer = page.locator(".exchange .answer")
    expect(answer.locator(".confidence")).to_be_visible()
    said = answer.locator(".words").inner_text()
    with site.client() as client:
        study = page.url.rsplit("/", 1)[1]
        (asked,) = client.get(f"/api/studies/{study}/questions").json()["questions"]
        assert said == asked["answer"]
        grey = _colour(page)
        answer.get_by_role("button", name="Evidence").click()
        expect(page.get_by_role("region", name="Evidence")).to_contain_text("No proof")
        jobs = client.get(f"/api/jobs?study={study}").json()["jobs"]
    (peak,) = [job["result"]["peak_mm"] for job in jobs if job["kind"] == "evidence"]
    # the page writes the half of 111.25 up, Python to even: either is there
    ends = {f"{abs(peak[2]) + rest:.1f}" for rest in (-1e-6, 1e-6)}
    height = rf"{'S' if peak[2] >= 0 else 'I'} ({'|'.join(map(re.escape, ends))}) mm"
    expect(page.locator(".readout")).to_have_text(re.compile(height))
    assert _colour(page) > 10 * max(grey, 1)
    page.get_by_label("Opacity").fill("100")
    page.keyboard.press("e")
    expect(page.get_by_role("region", name="Evidence")).to_be_hidden()


def _colour(page: Page) -> int:
    """How many pixels of the images have a warm colour."""
    shot = Image.open(io.BytesIO(page.locator(".images").screenshot())).convert("RGB")
    red, _, blue = np.moveaxis(np.asarray(shot).astype(int), 2, 0)
    return int((red - blue > 25).sum())


def _report(page: Page, site: Site) -> None:
    page.keyboard.press("Escape")
    page.keyboard.press("r")
    page.get_by_role("button", name="Draft a report").click()
    sentences = page.locator(".sentence")
    expect(sentences.nth(2)).to_be_visible()
    first, second = (sentences.nth(i).locator(".sentence-text").inner_text() for i in (0, 1))

    page.keyboard.press("r")
    page.keyboard.press("x")  # the first is rejected, the second is next
    page.keyboard.press("i")
    page.keyboard.type(" This was added by hand.")
    page.keyboard.press("Enter")
    expect(sentences.nth(0)).to_have_attribute("data-status", "rejected")
    expect(sentences.nth(1)).to_have_attribute("data-status", "edited")
    expect(sentences.nth(1).locator("ins")).to_contain_text("This was added by hand.")
    page.keyboard.press("x")
    expect(sentences.nth(1)).to_have_attribute("data-status", "rejected")
    page.keyboard.press("z")
    expect(sentences.nth(1)).to_have_attribute("data-status", "edited")
    expect(page.locator(".saved")).to_have_text("Saved")

    page.keyboard.press("S")
    expect(page.get_by_text("not checked yet")).to_be_visible()
    page.keyboard.press("Y")
    page.keyboard.press("S")
    dialog = page.get_by_role("dialog", name="Sign this report")
    expect(dialog.get_by_label("Name")).to_have_value(site.shown)
    text = dialog.get_by_label("The text that will be signed")
    expect(text).to_contain_text(f"{second} This was added by hand.")
    expect(text).not_to_contain_text(first)
    dialog.get_by_role("button", name="Sign").click()  # not without the tick
    expect(dialog).to_be_visible()
    dialog.get_by_text("I have looked at the images").click()
    dialog.get_by_role("button", name="Sign").click()
    expect(page.locator(".signature")).to_contain_text(f"Signed by {site.shown}")

    page.keyboard.press("v")
    changes = page.locator(".changes")
    expect(changes.locator("[data-kind=edited] ins")).to_contain_text("added by hand")
    expect(changes.locator("[data-kind=rejected] del")).to_have_text(first)


def _find_and_export(page: Page) -> None:
    page.reload()
    expect(page.locator(".signature")).to_be_visible()
    page.get_by_role("button", name="Export").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Plain text").click()
    text = download.value.path().read_text()
    assert "This was added by hand." in text and "Dr. Maria Weiss" in text
    study = page.url.rsplit("/", 1)[1]
    page.keyboard.press("f")
    page.get_by_label("Describe what the scan should show").fill("This was added by hand.")
    page.keyboard.press("Enter")
    # among the hits, not the first: other tests' studies are in this index, too, and may look more
    # like a sentence that means nothing to the model
    name = page.locator(f'.hit a.name[href="#/study/{study}"]')
    expect(name).to_be_visible()
    name.click()
    expect(page.locator(".signature")).to_be_visible()
