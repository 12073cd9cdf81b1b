"""What is kept in the database: studies, questions, reports, jobs.

    studies ─┬─ questions ── jobs ── job_events      what was asked, who works on it, what came
             ├─ report_versions                      drafts by the model, edits by people
             ├─ signatures                           one a study: nothing is signed twice
             ├─ report_documents                     Structured Reports that have left
             └─ addenda                              what was added after
    results                                          by content: the same question is computed once
    workers                                          who is alive, with which model

Accounts and the audit log are in `access/` and `audit.py`.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Index, Integer, String, Text, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from med3dvlm.service.database import Base, new_id, utc_now

Number = BigInteger().with_variant(Integer(), "sqlite")  # SQLite counts up only in an INTEGER
Id = String(32)
Name = String(200)

ACTIVE = ("queued", "running")
STUDY = "studies.id"


class Study(Base):
    """A series that was received, and what its headers say.

    Attributes:
        number: counts up; the worklist is read from the newest back.
        content: SHA-256 of the files as they came, whatever their names.
        voxels: SHA-256 of the scan as it was read: results are remembered by it.
        source: "upload", "pacs" or what brought it.
        units, orientation: what a NIfTI file of the scan cannot say.
    """

    __tablename__ = "studies"

    number: Mapped[int] = mapped_column(Number, primary_key=True)
    id: Mapped[str] = mapped_column(Id, unique=True, default=new_id)
    content: Mapped[str] = mapped_column(String(64), unique=True)
    voxels: Mapped[str] = mapped_column(String(64), default="")
    created: Mapped[datetime] = mapped_column(default=utc_now)
    created_by: Mapped[str] = mapped_column(Name)
    source: Mapped[str] = mapped_column(String(40))
    file: Mapped[str] = mapped_column(Name)
    state: Mapped[str] = mapped_column(String(20), default="received", index=True)
    reason: Mapped[str] = mapped_column(Text, default="")
    report_state: Mapped[str] = mapped_column(String(20), default="none")
    patient_name: Mapped[str] = mapped_column(Name, default="")
    patient_id: Mapped[str] = mapped_column(Name, default="")
    accession_number: Mapped[str] = mapped_column(Name, default="")
    study_uid: Mapped[str] = mapped_column(String(64), default="", index=True)
    series_uid: Mapped[str] = mapped_column(String(64), default="")
    study_date: Mapped[str] = mapped_column(String(10), default="")
    modality: Mapped[str] = mapped_column(String(16), default="")
    description: Mapped[str] = mapped_column(Name, default="")
    shape: Mapped[list[Any]] = mapped_column(default=list)
    spacing_mm: Mapped[list[Any]] = mapped_column(default=list)
    units: Mapped[str | None] = mapped_column(String(16))
    orientation: Mapped[str] = mapped_column(String(16), default="")
    warnings: Mapped[list[Any]] = mapped_column(default=list)


class Job(Base):
    """A piece of work: taken by a worker for as long as it renews its lease.

    Attributes:
        number: the order of the queue.
        study_id: what it is about; None for a fetch from the PACS until the study is here.
        owner: who asked; `user_limit` counts by it.
        request: what is to be done, by kind.
        attempts: how often it was begun.
        lease: until when its worker has it.
        progress: how far a fetch is.
    """

    __tablename__ = "jobs"
    __table_args__ = (Index("jobs_state_number", "state", "number"),)

    number: Mapped[int] = mapped_column(Number, primary_key=True)
    id: Mapped[str] = mapped_column(Id, unique=True, default=new_id)
    kind: Mapped[str] = mapped_column(String(20))
    study_id: Mapped[str | None] = mapped_column(ForeignKey(STUDY, ondelete="CASCADE"), index=True)
    owner: Mapped[str] = mapped_column(Name)
    state: Mapped[str] = mapped_column(String(20), default="queued")
    created: Mapped[datetime] = mapped_column(default=utc_now)
    started: Mapped[datetime | None]
    ended: Mapped[datetime | None]
    attempts: Mapped[int] = mapped_column(default=0)
    worker: Mapped[str] = mapped_column(String(100), default="")
    lease: Mapped[datetime | None]
    cancel: Mapped[bool] = mapped_column(default=False)
    error: Mapped[str] = mapped_column(Text, default="")
    request: Mapped[dict[str, Any]] = mapped_column(default=dict)
    result: Mapped[dict[str, Any] | None]
    progress: Mapped[dict[str, Any] | None]


class JobEvent(Base):
    """What happened to a job; numbers count up over all jobs in the order of the commits."""

    __tablename__ = "job_events"

    number: Mapped[int] = mapped_column(Number, primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), index=True)
    created: Mapped[datetime] = mapped_column(default=utc_now, index=True)
    kind: Mapped[str] = mapped_column(String(20))
    data: Mapped[dict[str, Any]]


class Question(Base):
    """A question about a study; `answer` is None until its job is done."""

    __tablename__ = "questions"

    number: Mapped[int] = mapped_column(Number, primary_key=True)
    id: Mapped[str] = mapped_column(Id, unique=True, default=new_id)
    study_id: Mapped[str] = mapped_column(ForeignKey(STUDY, ondelete="CASCADE"), index=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), index=True)
    created: Mapped[datetime] = mapped_column(default=utc_now)
    asked_by: Mapped[str] = mapped_column(Name)
    text: Mapped[str] = mapped_column(Text)
    choices: Mapped[list[Any] | None]
    answer: Mapped[dict[str, Any] | None]


class ReportVersion(Base):
    """A report as it stood; never changed, only followed by the next.

    Attributes:
        kind: "model" or "person".
        sentences: dicts of id, text, section, confidence, status, original.
        facts: of a draft by the model: method, model, weights, preparation, calibrated.
    """

    __tablename__ = "report_versions"
    __table_args__ = (UniqueConstraint("study_id", "version", name="one_of_each_version"),)

    number: Mapped[int] = mapped_column(Number, primary_key=True)
    study_id: Mapped[str] = mapped_column(ForeignKey(STUDY, ondelete="CASCADE"), index=True)
    version: Mapped[int]
    created: Mapped[datetime] = mapped_column(default=utc_now)
    author: Mapped[str] = mapped_column(Name)
    kind: Mapped[str] = mapped_column(String(10))
    sentences: Mapped[list[Any]]
    facts: Mapped[dict[str, Any]] = mapped_column(default=dict)


class Signature(Base):
    """That a named person stands by a version: one a study, by its primary key.

    Attributes:
        user: the account that signed; name: as it is shown.
        authenticated: whether the server knew who it was.
        digest: SHA-256 of the signed sentences.
    """

    __tablename__ = "signatures"

    study_id: Mapped[str] = mapped_column(ForeignKey(STUDY), primary_key=True)
    version: Mapped[int]
    user: Mapped[str] = mapped_column(Name)
    name: Mapped[str] = mapped_column(Name)
    authenticated: Mapped[bool]
    signed: Mapped[datetime] = mapped_column(default=utc_now)
    digest: Mapped[str] = mapped_column(String(64))


class Addendum(Base):
    """What a named person added to a signed report."""

    __tablename__ = "addenda"

    number: Mapped[int] = mapped_column(Number, primary_key=True)
    id: Mapped[str] = mapped_column(Id, unique=True, default=new_id)
    study_id: Mapped[str] = mapped_column(ForeignKey(STUDY), index=True)
    user: Mapped[str] = mapped_column(Name)
    name: Mapped[str] = mapped_column(Name)
    authenticated: Mapped[bool]
    created: Mapped[datetime] = mapped_column(default=utc_now)
    text: Mapped[str] = mapped_column(Text)


class ReportDocument(Base):
    """A Structured Report of a signed report that has left: later ones name it as predecessor.

    Attributes:
        format: "sr" or "basic-text-sr".
        addenda: how many addenda it has.
    """

    __tablename__ = "report_documents"
    __table_args__ = (UniqueConstraint("study_id", "sop_instance_uid", name="left_once"),)

    number: Mapped[int] = mapped_column(Number, primary_key=True)
    study_id: Mapped[str] = mapped_column(ForeignKey(STUDY, ondelete="CASCADE"))
    created: Mapped[datetime] = mapped_column(default=utc_now)
    format: Mapped[str] = mapped_column(String(20))
    addenda: Mapped[int]
    study_uid: Mapped[str] = mapped_column(String(64))
    series_uid: Mapped[str] = mapped_column(String(64))
    sop_class_uid: Mapped[str] = mapped_column(String(64))
    sop_instance_uid: Mapped[str] = mapped_column(String(64))


class Result(Base):
    """What a model once said, by what it was asked about what."""

    __tablename__ = "results"

    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    created: Mapped[datetime] = mapped_column(default=utc_now)
    value: Mapped[dict[str, Any]]


class WorkerSeen(Base):
    """A worker that is alive, or was at `seen`."""

    __tablename__ = "workers"

    name: Mapped[str] = mapped_column(String(100), primary_key=True)
    started: Mapped[datetime] = mapped_column(default=utc_now)
    seen: Mapped[datetime] = mapped_column(default=utc_now)
    facts: Mapped[dict[str, Any]] = mapped_column(default=dict)
