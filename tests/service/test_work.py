"""The queue: order, room, cancelling, taking up again, batches, what is remembered."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from datetime import timedelta

import pytest
from sqlalchemy import select, update

from med3dvlm.service import studies, tasks, work
from med3dvlm.service.access import Identity
from med3dvlm.service.core import Service
from med3dvlm.service.database import utc_now
from med3dvlm.service.events import EventHub
from med3dvlm.service.migrations import migrate
from med3dvlm.service.settings import load_settings
from med3dvlm.service.tables import Job, JobEvent, Result, Study, WorkerSeen
from med3dvlm.service.work import Outcome, QueueFull, UserLimit, Worker

ME = Identity("local", "local", "reviewer", "local")


@pytest.fixture
def core(tmp_path):
    settings = load_settings(
        data=tmp_path, environment={}, queue_limit=6, user_limit=4, lease_s=0.4, attempts=2
    )
    service = Service.open(settings)
    migrate(service.database)
    with service.database.session() as session:
        session.add(
            Study(
                id="s" * 32, content="c", created_by="x", source="upload", file="f", state="ready"
            )
        )
    yield service
    service.close()


def submit(core: Service, kind: str = "ask", who: Identity = ME, **request) -> str:
    with core.database.session() as session:
        return work.submit(session, core.settings, kind, "s" * 32, who, **request).id


def job(core: Service, job_id: str) -> Job:
    with core.database.reading() as session:
        return session.scalars(select(Job).where(Job.id == job_id)).one()


def claim(core: Service, worker: Worker) -> list[str]:
    return [one.id for one in worker._claim()]


def test_jobs_are_taken_in_order_and_those_of_a_kind_together(core):
    first, other, second = submit(core), submit(core, "evidence"), submit(core)
    with core.database.reading() as session:
        assert work.describe(session, job(core, second))["position"] == 3
    worker = Worker(core)
    assert claim(core, worker) == [first, second]
    assert claim(core, Worker(core)) == [other]
    assert claim(core, Worker(core)) == []


def test_too_much_is_refused(core):
    for _ in range(4):
        submit(core)
    with pytest.raises(UserLimit, match="4 jobs waiting"):
        submit(core)
    for who in ("a", "b"):
        submit(core, who=Identity(who, who, "reader", "user"))
    with pytest.raises(QueueFull):
        submit(core, who=Identity("c", "c", "reader", "user"))


def test_two_workers_never_take_the_same(core):
    ids = {submit(core, "evidence", Identity(f"u{i}", "u", "reader", "user")) for i in range(6)}
    taken: list[str] = []

    def take() -> None:
        worker = Worker(core)
        while found := claim(core, worker):
            taken.extend(found)

    threads = [threading.Thread(target=take) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == sorted(ids)


def test_the_work_of_a_dead_worker_is_taken_up_and_given_up_at_last(core):
    dead, alive = Worker(core), Worker(core)
    job_id = submit(core)
    (held,) = dead._claim()
    assert claim(core, alive) == []  # its lease holds
    time.sleep(0.5)
    assert claim(core, alive) == [job_id]
    dead._finish(held, Outcome(lambda session, job: {"from": "the dead"}))
    assert job(core, job_id).state == "running"  # it holds it no more
    time.sleep(0.5)
    assert claim(core, alive) == []
    ended = job(core, job_id)
    assert ended.state == "failed" and "begun 2 times" in ended.error


def test_one_that_was_begun_before_is_worked_on_alone(core):
    first, second = submit(core), submit(core)
    assert claim(core, Worker(core)) == [first, second]
    time.sleep(0.5)
    third = submit(core)
    worker = Worker(core)
    assert [claim(core, worker) for _ in range(3)] == [[first], [second], [third]]


def test_a_lease_is_renewed_while_the_work_goes_on(core, monkeypatch):
    def slow(worker, jobs):
        time.sleep(1.2)  # three leases
        return [Outcome(lambda session, job: {"by": worker.name})]

    monkeypatch.setitem(tasks.TASKS, "ask", slow)
    monkeypatch.setitem(core.models.__dict__, "facts", {"model": "none"})
    workers = [Worker(core), Worker(core)]
    job_id = submit(core)
    for worker in workers:
        worker.start()
    until = time.monotonic() + 10
    while job(core, job_id).state != "done" and time.monotonic() < until:
        time.sleep(0.05)
    for worker in workers:
        worker.stop()
    assert job(core, job_id).state == "done" and job(core, job_id).attempts == 1


def test_the_heart_beats_on_when_tending_fails(core, monkeypatch):
    failed = []

    def fail(known):
        failed.append(utc_now())
        raise OSError("Stale file handle")

    monkeypatch.setattr(core.storage, "tend", fail)
    monkeypatch.setitem(core.models.__dict__, "facts", {"model": "none"})
    worker = Worker(core)
    worker.start()
    until, seen = time.monotonic() + 20, None
    while not (failed and seen and seen > failed[0]):
        assert time.monotonic() < until
        time.sleep(0.05)
        with core.database.reading() as session:
            mine = select(WorkerSeen.seen).where(WorkerSeen.name == worker.name)
            seen = session.scalar(mine)
    worker.stop()


def test_what_is_claimed_is_held_once_the_claim_is_committed(core, monkeypatch):
    """Before, the heartbeat of another transaction would not find it, and give it up."""
    worker, held = Worker(core), []
    session = core.database.session

    @contextmanager
    def committed():
        with session() as opened:
            yield opened
            held.append(dict(worker.held))

    monkeypatch.setattr(core.database, "session", committed)
    job_id = submit(core)
    worker._claim()
    assert held[-1] == {} and worker.held == {job_id: 1}


def test_a_worker_that_is_told_to_stop_gives_its_work_back(core, monkeypatch):
    def patient(worker, jobs):
        while True:
            worker.check(jobs[0])
            time.sleep(0.02)

    monkeypatch.setitem(tasks.TASKS, "ask", patient)
    monkeypatch.setitem(core.models.__dict__, "facts", {"model": "none"})
    worker = Worker(core)
    job_id = submit(core)
    worker.start()
    while job(core, job_id).state != "running":
        time.sleep(0.02)
    worker.stop()
    given_back = job(core, job_id)
    assert (given_back.state, given_back.attempts) == ("queued", 0)


def test_of_a_batch_only_the_faulty_one_fails(core, monkeypatch):
    def task(worker, jobs):
        if any(one.request.get("bad") for one in jobs):
            raise ValueError("The question is too long.")
        return [Outcome(lambda session, job: {"fine": True}) for _ in jobs]

    monkeypatch.setitem(tasks.TASKS, "ask", task)
    good, bad = submit(core), submit(core, bad=True)
    worker = Worker(core)
    worker.work(worker._claim())
    assert job(core, good).state == "done"
    assert (job(core, bad).state, job(core, bad).error) == ("failed", "The question is too long.")


def test_what_fails_for_no_known_reason_is_tried_again_then_failed(core, monkeypatch):
    def broken(worker, jobs):
        raise RuntimeError("out of memory")

    monkeypatch.setitem(tasks.TASKS, "ask", broken)
    job_id, worker = submit(core), Worker(core)
    worker.work(worker._claim())
    assert job(core, job_id).state == "queued"
    worker.work(worker._claim())
    ended = job(core, job_id)
    assert ended.state == "failed" and "RuntimeError" in ended.error
    assert "memory" not in ended.error  # the log says that


def test_events_keep_their_order_and_are_forgotten_in_time(core):
    job_id = submit(core)
    worker = Worker(core)
    worker._claim()
    worker.tell([(job_id, "The lungs"), (job_id, " are clear.")])
    with core.database.session() as session:
        events = list(session.scalars(select(JobEvent).order_by(JobEvent.number)))
        assert [event.kind for event in events] == ["state", "token", "token"]
        old = utc_now() - timedelta(hours=100)
        session.execute(update(JobEvent).values(created=old))
    worker._tend()
    with core.database.reading() as session:
        assert session.scalars(select(JobEvent)).all() == []


# --- with the model ---------------------------------------------------------------------------


def test_questions_about_several_studies_are_answered_together_as_alone(service, phantom_files):
    about = [service.upload(path) for path in phantom_files[:3]]
    texts = [
        "Is there pleural effusion?",
        "Is there cardiomegaly?",
        "Which contrast phase is this?",
    ]
    model = service.core.models.language
    worker = Worker(service.core)
    service.client.app.state.worker.stopping.set()  # so that all wait together
    service.client.app.state.worker.stop()
    jobs = [
        service.client.post(f"/api/studies/{study['id']}/questions", json={"text": text}).json()
        for study in about
        for text in texts
    ]
    choices = {"text": "Which side is it on?", "choices": ["left", "right"]}
    url = f"/api/studies/{about[0]['id']}/questions"
    jobs.append(service.client.post(url, json=choices).json())
    claimed = worker._claim()
    assert len(claimed) == service.core.settings.batch
    worker.work(claimed)
    replacement = service.client.app.state.worker = Worker(service.core)
    replacement.start()
    answers = [service.done(one["job"])["result"] for one in jobs]
    from med3dvlm import read_scan

    scans = [read_scan(path) for path in phantom_files[:3]]
    alone = [model.ask(scan, text) for scan in scans for text in texts]
    assert [one["answer"] for one in answers[:9]] == alone
    chosen = model.ask(scans[0], choices["text"], choices["choices"])
    assert answers[9]["answer"] == chosen
    assert sum(answers[9]["choices_confidence"].values()) == pytest.approx(1)
    assert answers[9]["choices_likelihood"] == pytest.approx(dict(chosen.choices), abs=1e-4)


def test_the_same_question_is_computed_once(service, study):
    url = f"/api/studies/{study['id']}/questions"
    body = {"text": "Is there consolidation?"}
    first = service.done(service.client.post(url, json=body).json()["job"])
    with service.core.database.reading() as session:
        known = len(session.scalars(select(Result)).all())
    again = service.client.post(url, json=body).json()["job"]["id"]
    events = service.events(again)
    assert "token" not in [kind for _, kind, _ in events]  # nothing was written anew
    assert events[-1][2]["result"]["answer"] == first["result"]["answer"]
    with service.core.database.reading() as session:
        assert len(session.scalars(select(Result)).all()) == known


def test_a_stream_goes_on_where_it_was_cut_off(service, study):
    url = f"/api/studies/{study['id']}/questions"
    asked = service.client.post(url, json={"text": "What is the most important abnormality?"})
    job_id = asked.json()["job"]["id"]
    assert service.events(job_id)[-1][1] == "done"
    events = service.events(job_id)
    assert service.events(job_id) == events  # it can be read again
    for k in range(len(events)):
        rest = service.events(job_id, last=events[k][0])
        assert rest == (events[k + 1 :] or events[-1:])


def test_a_job_is_called_off(service, study):
    url = f"/api/studies/{study['id']}"
    body = {"text": "lesion", "method": "occlusion"}  # hundreds of passes
    job_id = service.client.post(f"{url}/evidence", json=body).json()["job"]["id"]
    until = time.monotonic() + 20
    while service.client.get(f"/api/jobs/{job_id}").json()["state"] != "running":
        assert time.monotonic() < until
        time.sleep(0.02)
    waiting = service.client.post(f"{url}/questions", json={"text": "Is it large?"}).json()["job"]
    assert service.client.delete(f"/api/jobs/{waiting['id']}").json()["state"] == "cancelled"
    assert service.client.delete(f"/api/jobs/{job_id}").status_code == 200
    assert service.done(job_id)["state"] == "cancelled"
    assert [kind for _, kind, _ in service.events(job_id)][-1] == "cancelled"


def test_nothing_is_left_of_a_study_that_was_thrown_away_meanwhile(
    service, fresh_study, monkeypatch
):
    core, study, done = service.core, fresh_study["id"], threading.Event()
    service.idle()
    put = core.index.put

    def put_late(entry, vector):
        studies.remove(core, study, ME, signed=False)
        put(entry, vector)
        done.set()

    monkeypatch.setattr(core.index, "put", put_late)
    with core.database.session() as session:
        work.enqueue(session, "index", study, "local")
    assert done.wait(20)
    until = time.monotonic() + 20
    while core.index.vector(studies.key(study, studies.VOLUME)) is not None:
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_second_reader_at_the_start_takes_nothing_from_the_first(core):
    """It asked for the newest event before the first reader was there, and hears of it after."""
    import asyncio

    hub, job_id = EventHub(core), submit(core)
    newest, asked, told = hub._newest, [], threading.Event()

    def slowly() -> int:
        asked.append(True)
        if len(asked) == 2:
            assert told.wait(10)
        return newest()

    hub._newest = slowly

    async def first() -> list[str]:
        kinds = []
        async for _, kind, _ in hub.events(job_id):
            kinds.append(kind)
            if kind == "state":  # it has read what there was; now the end comes
                with core.database.session() as session:
                    work.cancel(session, work.find(session, job_id))
                told.set()
                await second
        return kinds

    async def both() -> list[str]:
        nonlocal second
        one = asyncio.create_task(first())
        second = asyncio.ensure_future(anext(hub.events(job_id)))
        return await asyncio.wait_for(one, 20)

    second: asyncio.Future = None  # type: ignore[assignment]
    assert asyncio.run(both()) == ["state", "cancelled"]
    hub.close()


def test_the_hub_waits_for_a_database_that_is_away(core):
    import asyncio

    from sqlalchemy.exc import OperationalError

    hub, away = EventHub(core), [True]
    job_id = submit(core)
    reading = core.database.reading

    def sometimes():
        if away[0]:
            away[0] = False
            raise OperationalError("SELECT 1", {}, Exception("gone"))
        return reading()

    core.database.reading = sometimes

    async def follow() -> list[str]:
        kinds = []
        async for _, kind, _ in hub.events(job_id):
            kinds.append(kind)
            if kind == "state":
                with core.database.session() as session:
                    found = work.find(session, job_id)
                    assert found is not None
                    work.cancel(session, found)
        return kinds

    assert asyncio.run(asyncio.wait_for(follow(), 10)) == ["state", "cancelled"]
    hub.close()
