"""Watching a PACS: new studies that a rule names are taken once, when they are complete.

    every_s: 60                  # how often the PACS is asked
    stable_s: 120                # a study is complete when nothing was added for so long
    days: 2                      # of the last days, by the study's date
    rules:
      - name: chest CT of adults
        where: {Modality: CT, StudyDescription: ["*chest*", "*thorax*"], StationName: CT-3}
        age_years: [18, 120]
        images: [20, 4000]

`where` compares DICOM keywords with patterns (`*` and `?`, any case); of several patterns one has
to fit. Of the series that fit the first rule that has any, the one with most images is taken.
"""

from __future__ import annotations

import fcntl
import os
import re
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pydicom
from omegaconf import MISSING
from omegaconf.errors import OmegaConfBaseException
from pydicom.datadict import tag_for_keyword
from yaml import YAMLError

from med3dvlm.files import read_yaml
from med3dvlm.hospital.dicomweb import FoundStudy, Pacs, PacsError

TRANSIENT_WAIT_S = 300  # longest pause after a PACS or service was not there


class RulesError(ValueError):
    """Rules that cannot be followed: which, and what they may be."""


class TryLater(Exception):
    """A study that could not be drafted now, through no fault of its own: it does not count."""


@dataclass
class Rule:
    """Which series are taken; all conditions have to fit."""

    name: str = MISSING
    where: dict[str, Any] = field(default_factory=dict)
    age_years: list[float] | None = None
    images: list[int] | None = None

    def check(self) -> None:
        for keyword in self.where:
            if tag_for_keyword(keyword) is None:
                raise RulesError(
                    f"rule {self.name!r}: {keyword!r} is no DICOM keyword; use names like Modality."
                )
        for name, pair in (("age_years", self.age_years), ("images", self.images)):
            if pair is not None and (len(pair) != 2 or pair[0] > pair[1]):
                raise RulesError(f"rule {self.name!r}: {name} is a pair, the least and the most.")

    def fits(self, series: _Series) -> bool:
        if self.images and not self.images[0] <= series.images <= self.images[1]:
            return False
        if not all(_matches(series.value(k), patterns) for k, patterns in self.where.items()):
            return False
        if self.age_years is None:
            return True
        years = age_years(series)
        return years is not None and self.age_years[0] <= years <= self.age_years[1]


@dataclass
class Rules:
    """What a watcher does; see the top of the module."""

    rules: list[Rule] = field(default_factory=list)
    every_s: float = 60.0
    stable_s: float = 120.0
    days: int = 2
    attempts: int = 3  # times that a study is tried
    limit: int = 1000  # studies looked at each time


def read_rules(path: Path | str) -> Rules:
    """Rules from a YAML file; an unknown key is an error.

    Raises:
        RulesError: one sentence on the file and the key.
    """
    try:
        rules = read_yaml(path, Rules)
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RulesError(f"{path}: these are no rules ({reason}).") from error
    if not rules.rules:
        raise RulesError(f"{path}: it has no rules; name at least one under 'rules:'.")
    for rule in rules.rules:
        try:
            rule.check()
        except RulesError as error:
            raise RulesError(f"{path}: {error}") from error
    if min(rules.every_s, rules.attempts, rules.limit) <= 0 or min(rules.stable_s, rules.days) < 0:
        raise RulesError(
            f"{path}: every_s, attempts and limit must be above zero, stable_s and days not below."
        )
    return rules


@dataclass(frozen=True)
class Taken:
    """A series that was fetched, for whoever drafts its report.

    Attributes:
        folder: its images; gone when the draft is made.
        header: what the PACS says of it.
    """

    folder: Path
    study_uid: str
    series_uid: str
    rule: str
    header: pydicom.Dataset


Draft = Callable[[Taken], str]
"""Drafts a report about what was taken; returns where it is. May be called again for a study after
a crash, and must then not make a second one."""


class Watcher:
    """Asks a PACS again and again; what it took is remembered in a file, across restarts.

    Args:
        state: the file; one watcher at a time may use it.
        say: called with a sentence for what happens.
    """

    def __init__(
        self,
        pacs: Pacs,
        rules: Rules,
        state: Path | str,
        draft: Draft,
        *,
        say: Callable[[str], None] = lambda sentence: None,
    ):
        self.pacs, self.rules, self.draft, self.say = pacs, rules, draft, say
        self.memory = Memory(state)

    def close(self) -> None:
        self.memory.close()

    def run(self, stop: threading.Event | None = None) -> None:
        """Look until `stop` is set; a PACS that is away is waited for, ever longer."""
        stop, wait = stop or threading.Event(), self.rules.every_s
        while not stop.is_set():
            try:
                self.look()
                wait = self.rules.every_s
            except PacsError as error:
                if not error.passing:
                    raise
                self.say(str(error))
                wait = min(2 * wait, max(TRANSIENT_WAIT_S, self.rules.every_s))
            stop.wait(wait)

    def look(self) -> list[str]:
        """Ask once; gives the UIDs of the studies whose reports were drafted."""
        since = date.today() - timedelta(days=self.rules.days)
        found = self.pacs.find(limit=self.rules.limit, StudyDate=f"{since:%Y%m%d}-")
        if len(found) == self.rules.limit:
            self.say(f"more than {len(found)} studies: raise 'limit', or lower 'days'.")
        return [study.study_uid for study in found if self._consider(study)]

    def _consider(self, study: FoundStudy) -> bool:
        entry = self.memory.entry(study.study_uid)
        if entry.state in ("drafted", "failed"):
            return False
        images = study.images
        if images is None:
            images = sum(one.images or 0 for one in self.pacs.series(study.study_uid))
        now = time.time()
        if images != entry.images:  # it grows, or is new: also one that no rule named so far
            self.memory.note(study.study_uid, state="seen", images=images, since=now)
            if self.rules.stable_s > 0:
                return False
            entry = self.memory.entry(study.study_uid)
        if entry.state == "passed over" or now - entry.since < self.rules.stable_s:
            return False
        if entry.attempts >= self.rules.attempts:  # each time something killed the watcher
            self._failed(study.study_uid, RulesError("the watcher died of it"), entry.attempts)
            return False
        try:
            rule, series = self._choose(study)
        except PacsError as error:
            if error.passing:
                raise
            self._failed(study.study_uid, error, entry.attempts + 1)
            return False
        if series is None:
            self.memory.note(study.study_uid, state="passed over")
            return False
        return self._take(study, series, rule, entry.attempts + 1)

    def _choose(self, study: FoundStudy) -> tuple[str, _Series | None]:
        """The name of the first rule that fits, and the largest series that it fits."""
        listed = [_Series(self.pacs, study, one) for one in self.pacs.series(study.study_uid)]
        for rule in self.rules.rules:
            fitting = [series for series in listed if rule.fits(series)]
            if fitting:
                return rule.name, max(fitting, key=lambda series: series.images)
        return "", None

    def _take(self, study: FoundStudy, series: _Series, rule: str, attempt: int) -> bool:
        uid = study.study_uid
        # remembered first: after a crash it counts as an attempt, so that what kills the watcher
        # is not taken for ever
        self.memory.note(uid, state="taken", attempts=attempt, rule=rule, series=series.uid)
        try:
            with tempfile.TemporaryDirectory(prefix="med3dvlm-") as folder:
                place = Path(folder, "images")
                self.pacs.get(uid, place, series_uid=series.uid)
                result = self.draft(Taken(place, uid, series.uid, rule, series.header))
        except (TryLater, PacsError) as error:
            passing = isinstance(error, TryLater) or error.passing
            self._failed(uid, error, attempt - 1 if passing else attempt)
            return False
        except (ValueError, OSError) as error:
            self._failed(uid, error, attempt)
            return False
        self.memory.note(uid, state="drafted", reason="", result=result)
        self.say(f"study {uid}: drafted by rule {rule!r}: {result}")
        return True

    def _failed(self, uid: str, error: Exception, attempts: int) -> None:
        final = attempts >= self.rules.attempts
        reason = " ".join(str(error).split())[:500] or type(error).__name__
        self.memory.note(uid, state="failed" if final else "seen", attempts=attempts, reason=reason)
        self.say(f"study {uid}: {reason}" + (" It is given up." if final else ""))


# --- conditions ---------------------------------------------------------------------------------


class _Series:
    """A series of a study; what the PACS's lists leave out is asked of its first image."""

    def __init__(self, pacs: Pacs, study: FoundStudy, series: FoundStudy):
        self.pacs, self.study, self.uid = pacs, study, series.series_uid
        self.header = pydicom.Dataset()
        self.header.update(study.header)
        self.header.update(series.header)
        self.images = series.images or 0
        self.whole = False

    def value(self, keyword: str) -> Any:
        if keyword not in self.header and not self.whole:
            image = self.pacs.first_header(self.study.study_uid, self.uid)
            for element in image:
                if element.tag not in self.header:
                    self.header.add(element)
            self.whole = True
        return self.header.get(keyword, None)


def age_years(series: _Series) -> float | None:
    """Of the patient at the time of the study: as stated, or from the dates; None if unknown."""
    born, when = (_day(series.value(k)) for k in ("PatientBirthDate", "StudyDate"))
    if born and when:
        return (when - born).days / 365.25
    stated = re.fullmatch(r"(\d{3})([DWMY])", str(series.value("PatientAge") or "").strip())
    if stated is None:
        return None
    return int(stated[1]) / {"D": 365.25, "W": 52.18, "M": 12, "Y": 1}[stated[2]]


def _day(value: Any) -> date | None:
    text = str(value or "")
    try:
        return date(int(text[:4]), int(text[4:6]), int(text[6:8]))
    except ValueError:
        return None


def _matches(value: Any, patterns: Any) -> bool:
    """Whether any of the values fits any of the patterns; what is missing fits only ""."""
    several = isinstance(value, Sequence) and not isinstance(value, str)
    values = [str(one).casefold().strip() for one in (value if several else [value or ""])]
    listed = patterns if isinstance(patterns, list) else [patterns]
    wanted = [str(one).casefold() for one in listed]
    return any(fnmatchcase(one, pattern) for one in values for pattern in wanted)


# --- memory -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """What is remembered of a study.

    Attributes:
        state: "seen", "passed over" (by every rule), "taken", "drafted" or "failed".
        images: how many it had when it was last looked at.
        since: when that number last changed, seconds since 1970.
        attempts: how often it was taken.
    """

    uid: str
    state: str = ""
    images: int = -1
    since: float = 0.0
    attempts: int = 0
    rule: str = ""
    series: str = ""
    reason: str = ""
    result: str = ""


class Memory:
    """Entries in an SQLite file, safe against crashes; held by one process at a time.

    Raises:
        RulesError: where another watcher holds it, or it is none.
    """

    def __init__(self, path: Path | str):
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.lock = os.open(f"{path}.lock", os.O_WRONLY | os.O_CREAT)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self.lock)
            raise RulesError(
                f"{path}: another watcher uses it; give this one a file of its own."
            ) from error
        try:
            self.connection = _opened(path)
        except sqlite3.DatabaseError as error:
            os.close(self.lock)
            raise RulesError(f"{path}: it is no memory of a watcher ({error}).") from error

    def entry(self, uid: str) -> Entry:
        row = self.connection.execute("SELECT * FROM studies WHERE uid = ?", (uid,)).fetchone()
        return Entry(*row) if row else Entry(uid)

    def entries(self) -> list[Entry]:
        return [Entry(*row) for row in self.connection.execute("SELECT * FROM studies")]

    def note(self, uid: str, **changes: Any) -> None:
        """Remember changes of an entry, before anything else happens."""
        values = {**vars(self.entry(uid)), **changes}
        marks = ", ".join("?" for _ in values)
        self.connection.execute(
            f"INSERT OR REPLACE INTO studies ({', '.join(values)}) VALUES ({marks})",
            list(values.values()),
        )

    def close(self) -> None:
        self.connection.close()
        os.close(self.lock)


def _opened(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute(
            "CREATE TABLE IF NOT EXISTS studies (uid TEXT PRIMARY KEY, state TEXT NOT NULL, "
            "images INTEGER NOT NULL, since REAL NOT NULL, attempts INTEGER NOT NULL, "
            "rule TEXT NOT NULL, series TEXT NOT NULL, reason TEXT NOT NULL, "
            "result TEXT NOT NULL)"
        )
    except sqlite3.DatabaseError:
        connection.close()
        raise
    return connection
