"""The watcher against a real Orthanc: which studies it takes, when, and never twice."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from datetime import date
from types import SimpleNamespace

import pydicom
import pytest

from med3dvlm.hospital import Pacs, PacsError
from med3dvlm.hospital.watch import Memory, Rule, Rules, RulesError, TryLater, Watcher, read_rules
from tests.hospital.conftest import write_series

TODAY = f"{date.today():%Y%m%d}"


@pytest.fixture(scope="module")
def arrived(pacs_address, tmp_path_factory):
    """Two studies of today from one scanner: an adult's chest, a child's. By their UIDs."""
    uids = []
    with Pacs(pacs_address) as pacs:
        for index, born, description in ((14, "19700101", "CT Chest"), (17, "20200101", "CT Head")):
            folder = write_series(tmp_path_factory.mktemp("arrived"), index)
            slices = [pydicom.dcmread(file) for file in sorted(folder.iterdir())]
            for one in slices:
                one.StudyDate, one.PatientBirthDate = TODAY, born
                one.StudyDescription, one.StationName = description, "WATCHED"
                one.ImageComments = "generated phantom, no patient"
            pacs.send(slices)
            uids.append(slices[0].StudyInstanceUID)
    return uids


def rules(*given, **settings):
    return Rules(**{"stable_s": 0.0, "rules": list(given or [Rule("ours", OURS)]), **settings})


OURS = {"StationName": "watched"}


class Draft:
    """Remembers what it was given; fails as often as it is told to."""

    def __init__(self, *errors):
        self.taken, self.errors = [], list(errors)

    def __call__(self, taken):
        assert len(list(taken.folder.rglob("*.dcm"))) > 10
        self.taken.append(taken.study_uid)
        if self.errors:
            raise self.errors.pop(0)
        return f"draft of {taken.rule}"


def watcher(pacs, tmp_path, draft, given=None):
    return Watcher(pacs, given or rules(), tmp_path / "watch.db", draft)


def test_each_study_is_taken_once_also_after_a_restart(pacs_address, arrived, tmp_path):
    draft = Draft()
    with Pacs(pacs_address) as pacs:
        first = watcher(pacs, tmp_path, draft)
        assert sorted(first.look()) == sorted(arrived)
        assert first.look() == []
        first.close()
        second = watcher(pacs, tmp_path, draft)
        assert second.look() == []
        assert {e.state for e in second.memory.entries() if e.uid in arrived} == {"drafted"}
        second.close()
    assert sorted(draft.taken) == sorted(arrived)


@pytest.mark.parametrize(
    ("rule", "which"),
    [
        (Rule("adults", OURS, age_years=[18, 120]), [0]),
        (Rule("children", OURS, age_years=[0, 17.9]), [1]),
        (Rule("chest", {**OURS, "StudyDescription": ["*thorax*", "*chest*"]}), [0]),
        (Rule("MR", {**OURS, "Modality": "MR"}), []),
        (Rule("large", OURS, images=[500, 5000]), []),
        (Rule("scanner", {**OURS, "BodyPartExamined": "CHEST*"}), [0, 1]),
        (Rule("elsewhere", {"StationName": "other"}), []),
        (Rule("no such element", {**OURS, "ProtocolName": "x*"}), []),
    ],
    ids=lambda value: value.name if isinstance(value, Rule) else "",
)
def test_rules_say_which(pacs_address, arrived, tmp_path, rule, which):
    draft = Draft()
    with Pacs(pacs_address) as pacs:
        one = watcher(pacs, tmp_path, draft, rules(rule))
        one.look()
        one.close()
    assert sorted(draft.taken) == sorted(arrived[i] for i in which)


def test_a_study_that_still_grows_waits(pacs_address, tmp_path, monkeypatch):
    clock = SimpleNamespace(now=time.time())
    monkeypatch.setattr("med3dvlm.hospital.watch.time", SimpleNamespace(time=lambda: clock.now))
    folder = write_series(tmp_path / "late", 20)
    slices = [pydicom.dcmread(file) for file in sorted(folder.iterdir())]
    for one in slices:
        one.StudyDate, one.StationName = TODAY, "LATE"
    draft, given = Draft(), rules(Rule("late", {"StationName": "LATE"}), stable_s=60)
    with Pacs(pacs_address) as pacs:
        one = watcher(pacs, tmp_path, draft, given)
        pacs.send(slices[:12])
        assert one.look() == []
        clock.now += 40
        pacs.send(slices[12:])
        assert one.look() == []
        clock.now += 40
        assert one.look() == []  # 80 s after the first slices, 40 s after the last
        clock.now += 40
        assert one.look() == [slices[0].StudyInstanceUID]
        one.close()


def test_a_failed_draft_is_tried_again_a_few_times(pacs_address, arrived, tmp_path):
    errors = [ValueError("not a volume")] * 9
    draft = Draft(*errors)
    with Pacs(pacs_address) as pacs:
        one = watcher(pacs, tmp_path, draft, rules(Rule("adults", OURS, age_years=[18, 120])))
        for _ in range(5):
            assert one.look() == []
        entry = one.memory.entry(arrived[0])
        one.close()
    assert entry.state == "failed" and entry.reason == "not a volume"
    assert len(draft.taken) == 3


def test_a_busy_service_costs_no_attempt(pacs_address, arrived, tmp_path):
    draft = Draft(*[TryLater("busy")] * 5)
    with Pacs(pacs_address) as pacs:
        one = watcher(pacs, tmp_path, draft, rules(Rule("adults", OURS, age_years=[18, 120])))
        for _ in range(5):
            assert one.look() == []
        assert one.look() == [arrived[0]]
        one.close()


def test_what_was_taken_when_the_watcher_died_is_taken_up(pacs_address, arrived, tmp_path):
    class Killed(BaseException):
        pass

    draft = Draft(Killed())
    given = rules(Rule("adults", OURS, age_years=[18, 120]))
    with Pacs(pacs_address) as pacs:
        one = watcher(pacs, tmp_path, draft, given)
        with pytest.raises(Killed):
            one.look()
        one.close()
        two = watcher(pacs, tmp_path, draft, given)
        assert two.memory.entry(arrived[0]).state == "taken"
        assert two.look() == [arrived[0]]
        assert two.memory.entry(arrived[0]).attempts == 2
        two.close()


def test_a_pacs_that_is_away_ends_no_watcher(pacs_address, tmp_path):
    import threading

    said, stop = [], threading.Event()

    def say(sentence):
        said.append(sentence)
        stop.set()

    away = replace(pacs_address, url="https://localhost:1/dicom-web", attempts=1)
    with Pacs(away) as pacs:
        one = Watcher(pacs, rules(every_s=0.01), tmp_path / "watch.db", Draft(), say=say)
        one.run(stop)
        one.close()
    assert "nobody answers" in said[0]
    with Pacs(replace(pacs_address, password="wrong")) as pacs:
        one = watcher(pacs, tmp_path, Draft())
        with pytest.raises(PacsError, match="401"):
            one.run()
        one.close()


def test_two_watchers_do_not_share_a_memory(tmp_path):
    first = Memory(tmp_path / "watch.db")
    with pytest.raises(RulesError, match="another watcher"):
        Memory(tmp_path / "watch.db")
    first.close()
    Memory(tmp_path / "watch.db").close()
    (tmp_path / "other").write_text("no database, " * 100)
    with pytest.raises(RulesError, match="no memory"):
        Memory(tmp_path / "other")
    (tmp_path / "other").unlink()
    Memory(tmp_path / "other").close()  # the one that was refused holds it no more


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("rules: []", "no rules"),
        ("every_s: 5", "no rules"),
        ("rules: [{name: a, colour: red}]", "colour"),
        ("rules: [{name: a, where: {Colour: red}}]", "no DICOM keyword"),
        ("rules: [{name: a, age_years: [80, 18]}]", "pair"),
        ("rules: [{where: {Modality: CT}}]", "name"),
        ("rules: [{name: a}]\nstable_s: -1", "not below"),
        ("rules: [{name: a}]\nlimit: 0", "above zero"),
        ("rules: [", "no rules"),
    ],
)
def test_rules_that_cannot_be_followed_name_the_fault(tmp_path, text, reason):
    file = tmp_path / "rules.yaml"
    file.write_text(text)
    with pytest.raises(RulesError, match=reason) as caught:
        read_rules(file)
    assert str(file) in str(caught.value) and os.linesep not in str(caught.value)


def test_rules_are_read_as_written(tmp_path):
    file = tmp_path / "rules.yaml"
    file.write_text(
        "every_s: 30\nrules:\n  - name: chest\n    age_years: [18, 120]\n"
        "    where: {Modality: CT, StudyDescription: ['*a*']}\n"
    )
    found = read_rules(file)
    assert found.every_s == 30 and found.stable_s == 120
    assert found.rules[0].where == {"Modality": "CT", "StudyDescription": ["*a*"]}
