"""What the page owes to everybody: access, hostile text as text, a connection that may break."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

import med3dvlm.service
from med3dvlm.evidence import Calibration
from med3dvlm.hub import load_exact
from med3dvlm.scan import read_scan, save_dicom_series
from tests.service.browser.conftest import Site, open_study, serving, sign_in, watched

WEB = Path(med3dvlm.service.__file__).parent / "web"
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>"


# --- access ---------------------------------------------------------------------------------


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_axe_finds_no_serious_fault_on_any_view(page: Page, site: Site, study, theme):
    page.add_init_script(f"localStorage.setItem('med3dvlm.theme', '{theme}')")
    page.goto("/")
    page.get_by_label("Password").wait_for()
    _no_serious_fault(page)
    sign_in(page, site)
    page.locator(".studies tbody tr").first.wait_for()
    _no_serious_fault(page)
    page.keyboard.press("?")
    _no_serious_fault(page)
    page.keyboard.press("Escape")
    open_study(page, study)
    _draft(page)
    _no_serious_fault(page)
    page.get_by_role("button", name="Accept").first.click()
    page.keyboard.press("i")
    _no_serious_fault(page)
    page.keyboard.press("Escape")
    page.keyboard.press("Y")
    page.keyboard.press("S")
    page.get_by_role("dialog").wait_for()
    _no_serious_fault(page)
    page.keyboard.press("Escape")
    for key in "vb":
        page.keyboard.press(key)
        _no_serious_fault(page)
    page.keyboard.press("g")
    page.get_by_label("Question", exact=True).wait_for()
    _no_serious_fault(page)
    page.goto("/#/search?text=effusion")
    page.locator(".hit, .hits .empty").first.wait_for()
    _no_serious_fault(page)


def _draft(page: Page) -> None:
    page.locator(".report .sentence, .report .empty").first.wait_for()
    button = page.get_by_role("button", name="Draft a report")
    if button.count():
        button.click()
    page.locator(".sentence").first.wait_for()


def _no_serious_fault(page: Page) -> None:
    from axe_playwright_python.sync_playwright import Axe

    options: dict[str, Any] = {"resultTypes": ["violations"]}
    if page.evaluate("document.documentElement.dataset.theme") == "light":
        options["runOnly"] = ["color-contrast"]  # the rest is the same in both
    found = Axe().run(page, options=options).response["violations"]
    serious = [
        (one["id"], [node["html"][:200] for node in one["nodes"]])
        for one in found
        if one["impact"] in ("serious", "critical")
    ]
    assert not serious


def test_nothing_is_cut_off_at_twice_the_size(signed_in: Page, study):
    signed_in.set_viewport_size({"width": 640, "height": 360})
    for view in ("#/", f"#/study/{study['id']}", "#/search?text=effusion"):
        signed_in.goto(f"/{view}")
        signed_in.wait_for_load_state("networkidle")
        wide = signed_in.evaluate("document.scrollingElement.scrollWidth")
        assert wide <= 640, view
        expect(signed_in.get_by_text("Not a medical device")).to_be_in_viewport()


def test_single_keys_can_be_turned_off(signed_in: Page):
    signed_in.keyboard.press("?")
    help_ = signed_in.get_by_role("dialog", name="Keyboard shortcuts")
    expect(help_).to_contain_text("Next study")
    help_.get_by_label("Single-key shortcuts").uncheck()
    signed_in.keyboard.press("Escape")
    signed_in.keyboard.press("f")
    expect(signed_in).to_have_url(re.compile(r"/(#/)?$"))


# --- images ---------------------------------------------------------------------------------


def test_sides_are_marked_only_where_the_file_knows_them(signed_in: Page, site: Site, study):
    open_study(signed_in, study)
    axial = signed_in.locator(".view", has_text="Axial")
    expect(axial.locator(".letter.left")).to_have_text("R")  # as radiologists look at it
    expect(axial.locator(".letter.right")).to_have_text("L")
    unsure = {**study, "orientation": "unknown"}
    signed_in.route(f"**/api/studies/{study['id']}", lambda route: route.fulfill(json=unsure))
    signed_in.reload()
    signed_in.locator(".view .slice:not(:empty)").first.wait_for()
    expect(signed_in.locator(".letter")).to_have_count(0)


# --- confidence ---------------------------------------------------------------------------


def test_a_model_without_calibration_says_so(browser, phantom_files, tmp_path):
    bundled, folder = files("med3dvlm") / "assets" / "demo", tmp_path / "demo"
    shutil.copytree(bundled, folder, ignore=shutil.ignore_patterns("calibration.json"))
    with serving(tmp_path, model=str(folder)) as site:
        study = site.upload(phantom_files[1])
        with watched(browser, site) as page:
            sign_in(page, site)
            open_study(page, study)
            _draft(page)
            expect(page.locator(".report-head")).to_contain_text("not calibrated")
            expect(page.locator(".sentence .confidence")).to_have_count(0)


def test_one_changes_ones_own_password(browser, tmp_path):
    with serving(tmp_path) as site, watched(browser, site) as page:
        sign_in(page, site)
        elsewhere = site.client()
        page.get_by_role("button", name=site.shown).click()
        page.get_by_role("button", name="Change password").click()
        dialog = page.get_by_role("dialog", name="Change your password")
        _no_serious_fault(page)
        fresh = "umbrella-gravel-41-tango"
        for old, again, said in (
            ("wrong", fresh, "current password is wrong"),
            (site.password, "another-one", "not the same"),
            (site.password, fresh, ""),
        ):
            dialog.get_by_label("Current password").fill(old)
            dialog.get_by_label("New password", exact=True).fill(fresh)
            dialog.get_by_label("New password, once more").fill(again)
            dialog.get_by_role("button", name="Change").click()
            if said:
                expect(dialog.get_by_role("alert")).to_contain_text(said)
        expect(dialog).to_be_hidden()
        assert elsewhere.get("/api/session").json()["user"] is None
        assert elsewhere.get("/api/studies").status_code == 401
        page.reload()  # this browser goes on
        page.get_by_role("heading", name="Worklist").wait_for()
        page.get_by_role("button", name=site.shown).click()
        page.get_by_role("button", name="Sign out everywhere").click()
        page.get_by_label("Password").wait_for()
        replaced = replace(site, password=fresh)
        sign_in(page, replaced)


def test_the_notice_is_always_there(signed_in: Page):
    expect(signed_in.locator(".notice")).to_contain_text("only ever seen generated phantoms")


def test_confidences_are_shown_and_what_is_less_sure_is_marked(browser, phantom_files, tmp_path):
    with serving(tmp_path, model=str(_calibrated(tmp_path / "model"))) as site:
        study = site.upload(phantom_files[1])
        with watched(browser, site) as page:
            sign_in(page, site)
            open_study(page, study)
            _draft(page)
            figures = page.locator(".sentence .confidence .share")
            expect(figures.first).to_have_text(re.compile(r"^\d+%$"))
            least = min(int(text.rstrip("%")) for text in figures.all_inner_texts())
            page.get_by_label("“Cannot tell” below").fill(str(min(95, least // 5 * 5 + 5)))
            marked = page.locator(".sentence", has_text="Cannot tell")
            expect(marked.filter(has_text=f"{least}%").first).to_be_visible()
            page.keyboard.press("g")
            page.keyboard.type("Is there pleural effusion?")
            page.keyboard.press("Enter")
            shown = page.locator(".answer .confidence .share")
            expect(shown).to_have_text(re.compile(r"^\d+%$"))


def _calibrated(folder: Path) -> Path:
    """The bundled model with coefficients of no meaning: they are shown, not measured, here."""
    shutil.copytree(files("med3dvlm") / "assets" / "demo", folder)
    weights = load_exact(str(folder), part="language").fingerprint()
    made = Calibration(weights, "phantoms", 1.3, (0.8, 0.1), (0.9, -0.8, -0.6, 0.9))
    made.save(folder / "language_model")
    return folder


# --- hostile text ---------------------------------------------------------------------------


def test_a_script_is_shown_as_text(signed_in: Page, site: Site, phantom_series, tmp_path):
    scan = read_scan(phantom_series)
    other = replace(scan, array=scan.array[::2, ::2, ::2].copy())
    names = {"PatientName": f"{HOSTILE}^Eve", "PatientID": "EVE", "StudyDescription": HOSTILE}
    save_dicom_series(other, tmp_path / "eve", attributes=names)
    study = site.upload(tmp_path / "eve")
    signed_in.goto("/#/")
    expect(signed_in.locator("tr", has_text="EVE")).to_contain_text(HOSTILE)
    open_study(signed_in, study)
    expect(signed_in.locator(".crumb")).to_contain_text(HOSTILE)
    _draft(signed_in)
    signed_in.keyboard.press("i")
    signed_in.keyboard.type(HOSTILE)
    signed_in.keyboard.press("Enter")
    expect(signed_in.locator(".sentence ins").first).to_contain_text(HOSTILE)
    expect(signed_in.locator(".saved")).to_contain_text("Saved")
    signed_in.keyboard.press("v")
    expect(signed_in.locator(".changes")).to_contain_text(HOSTILE)
    assert signed_in.locator("img[onerror], main script").count() == 0


def test_no_file_of_the_page_makes_elements_of_text():
    markup = re.compile(r"\.(innerHTML|outerHTML|insertAdjacentHTML|srcdoc)|document\.write|eval\(")
    for file in (WEB / "js").rglob("*.js"):
        assert not markup.search(file.read_text()), file
    page = (WEB / "index.html").read_text()
    assert not re.search(r"<script>|<style|style=|\son[a-z]+=|https?://", page)


# --- the connection -------------------------------------------------------------------------


def test_a_stream_that_breaks_off_goes_on_after_the_last_event(signed_in: Page, study):
    asked_after: list[str | None] = []

    def cut(route) -> None:
        after = route.request.headers.get("last-event-id")
        asked_after.append(after)
        if after is not None:
            route.continue_()
            return
        response = route.fetch()
        events = response.text().split("\n\n")
        route.fulfill(response=response, body="\n\n".join([*events[:2], ""]))

    signed_in.route("**/api/jobs/*/events", cut)
    open_study(signed_in, study)
    signed_in.keyboard.press("g")
    signed_in.keyboard.type("Is there lung opacity?")
    signed_in.keyboard.press("Enter")
    expect(signed_in.locator(".answer .confidence").last).to_be_visible()
    assert asked_after[0] is None and asked_after[1] is not None


def test_a_lost_server_is_told_and_found_again(signed_in: Page):
    lost = signed_in.get_by_text("No connection")
    expect(lost).to_be_hidden()
    signed_in.context.set_offline(True)
    expect(lost).to_be_visible()
    signed_in.context.set_offline(False)
    expect(lost).to_be_hidden()


# --- several at a time ------------------------------------------------------------------------


def test_what_somebody_else_saved_is_not_overwritten(signed_in: Page, site: Site, phantom_files):
    study = site.upload(phantom_files[2])
    open_study(signed_in, study)
    _draft(signed_in)
    path = f"/api/studies/{study['id']}/report"
    with site.client() as other:
        report = other.get(path).json()
        sentences = [{"id": one["id"], "text": one["text"]} for one in report["sentences"]]
        sentences[0]["text"] = "Their words."
        edit = {"base_version": report["version"], "sentences": sentences}
        other.put(path, json=edit).raise_for_status()
        signed_in.keyboard.press("r")
        signed_in.keyboard.press("x")
        signed_in.keyboard.press("Control+s")
        expect(signed_in.get_by_role("alert")).to_contain_text("version 2, by weiss")
        assert other.get(path).json()["sentences"][0]["text"] == "Their words."
    signed_in.get_by_role("button", name="Load theirs").click()
    expect(signed_in.locator(".sentence-text").first).to_contain_text("Their words.")


def test_files_can_be_dropped(signed_in: Page, phantom_files):
    content = base64.b64encode(phantom_files[3].read_bytes()).decode()
    transfer = signed_in.evaluate_handle(
        """async (content) => {
            const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], "dropped.nii.gz"));
            return transfer;
        }""",
        content,
    )
    main = signed_in.locator("main")
    main.dispatch_event("dragenter", {"dataTransfer": transfer})
    expect(signed_in.get_by_text("Drop to add the studies")).to_be_visible()
    before = signed_in.locator(".studies tbody tr").count()
    main.dispatch_event("drop", {"dataTransfer": transfer})
    expect(signed_in.locator(".studies tbody tr")).to_have_count(before + 1)


# --- what it carries ------------------------------------------------------------------------


def test_carried_packages_are_the_ones_that_are_pinned():
    folder = WEB / "vendor"
    pinned = {"vendor.json"}
    for package in json.loads((folder / "vendor.json").read_text()):
        assert re.fullmatch(r"[\d.]+", package["version"])
        assert "Copyright" in (folder / package["licence"]).read_text()
        pinned.add(package["licence"])
        for file in package["files"]:
            content = (folder / file["to"]).read_bytes()
            assert hashlib.sha256(content).hexdigest() == file["sha256"], file["to"]
            pinned.add(file["to"])
    assert {file.name for file in folder.iterdir()} == pinned
