"""Worker processes beside the server."""

from __future__ import annotations

import multiprocessing
import threading
from typing import ClassVar

from med3dvlm.service.run import Processes
from med3dvlm.service.settings import Settings

WAIT_S = 30


class Slow(Settings):
    """Settings with which a worker's second start takes until `go` is set."""

    starts: ClassVar[list[int]] = []
    again: ClassVar[threading.Event] = threading.Event()
    go: ClassVar[threading.Event] = threading.Event()

    def __reduce__(self):
        self.starts.append(1)
        if len(self.starts) > 1:
            self.again.set()
            assert self.go.wait(WAIT_S)
        return Settings.model_validate, (self.model_dump(),)


def test_a_worker_that_is_being_restarted_ends_with_the_others(tmp_path):
    processes = Processes(Slow(data=tmp_path), 1)
    processes.start()
    try:
        processes.running[0].kill()
        assert Slow.again.wait(WAIT_S)
        threading.Timer(0.5, Slow.go.set).start()
        processes.stop()
        processes.watcher.join(WAIT_S)
        assert multiprocessing.active_children() == []
    finally:
        Slow.go.set()
        for process in multiprocessing.active_children():
            process.kill()
