"""Running it: the server in one process, workers as a thread of it or as processes beside it."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import threading
from multiprocessing.context import SpawnProcess
from typing import Any

import uvicorn
from prometheus_client import start_http_server

from med3dvlm.service.access.gate import (
    IN_CLEAR,
    OPEN_NOTICE,
    check_bind,
    is_in_clear,
    open_mode,
)
from med3dvlm.service.app import create_app
from med3dvlm.service.core import Service
from med3dvlm.service.migrations import migrate
from med3dvlm.service.settings import Settings
from med3dvlm.service.work import Worker

GRACE_S = 10  # for requests and jobs under way, when it is told to stop
RESTART_S = 2  # before a worker that died is started anew

log = logging.getLogger("med3dvlm.service")


def serve(settings: Settings) -> None:
    """Answer requests until a signal says stop.

    Raises:
        ValueError: where anybody would be let in from elsewhere.
    """
    app = create_app(settings)
    check_bind(settings, app.state.database)
    if open_mode(settings, app.state.database):
        log.warning(OPEN_NOTICE)
    elif is_in_clear(settings):
        log.warning(IN_CLEAR)
    workers = Processes(settings, settings.workers or 0)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            ssl_certfile=settings.tls_certificate,
            ssl_keyfile=settings.tls_key,
            proxy_headers=False,  # the app trusts those of settings.trusted_proxies itself
            server_header=False,
            access_log=False,  # queries hold patients' names; the audit log says who did what
            log_level="warning",
            timeout_graceful_shutdown=GRACE_S,
        )
    )
    scheme = "https" if settings.tls_certificate else "http"
    log.info("serving %s://%s:%d", scheme, settings.host, settings.port)
    try:
        workers.start()
        server.run()
    finally:
        workers.stop()


def work(settings: Settings) -> None:
    """Do jobs until a signal says stop; what is unfinished then is given back."""
    service = Service.open(settings)
    migrate(service.database)
    worker = Worker(service)

    def stop(number: int, frame: Any) -> None:
        worker.stopping.set()
        worker.awake.set()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    if settings.metrics_port:
        start_http_server(settings.metrics_port, settings.host)
    try:
        worker.run()
    finally:
        worker.stop()
        service.close()


class Processes:
    """Workers as processes; one that dies is started anew."""

    def __init__(self, settings: Settings, count: int):
        # only one of them could have the port of the metrics
        self.settings = settings.model_copy(update={"metrics_port": 0})
        self.running: list[SpawnProcess] = [self._new() for _ in range(count)]
        self.stopping = threading.Event()
        self.watcher = threading.Thread(target=self._watch, name="watch workers", daemon=True)

    def start(self) -> None:
        for process in self.running:
            process.start()
        if self.running:
            self.watcher.start()

    def stop(self) -> None:
        """End them all; none lives when this returns."""
        self.stopping.set()
        if self.watcher.is_alive():
            self.watcher.join()  # it may be starting one, which could not be ended before
        for process in self.running:
            if process.is_alive():
                process.terminate()
        for process in self.running:
            if process.pid is not None:
                process.join(2 * GRACE_S)
                process.kill()
                process.join()

    def _new(self) -> SpawnProcess:
        context = multiprocessing.get_context("spawn")
        return context.Process(target=_work_beside, args=(self.settings,), name="worker")

    def _watch(self) -> None:
        while not self.stopping.wait(RESTART_S):
            for place, process in enumerate(self.running):
                if not process.is_alive() and not self.stopping.is_set():
                    log.error("a worker died (exit code %s); another begins", process.exitcode)
                    self.running[place] = self._new()
                    self.running[place].start()


def _work_beside(settings: Settings) -> None:
    set_up_logging()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    work(settings)


def _end_with_parent() -> None:
    """A worker whose server was killed ends, too: its jobs are taken up by the next."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        signal.raise_signal(signal.SIGTERM)


def set_up_logging() -> None:
    """What happens goes to standard error, a line each."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("med3dvlm").setLevel(logging.INFO)
    logging.getLogger("alembic").setLevel(logging.WARNING)
