"""The command line as a user has it: arguments in, streams and exit status out."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import pytest

from med3dvlm import cli


@dataclass
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys, monkeypatch) -> Callable[..., Outcome]:
    """Run a command in this process, so that nothing is imported twice."""

    def call(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["med3dvlm", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as leave:
            code = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
        streams = capsys.readouterr()
        return Outcome(code, streams.out, streams.err)

    return call


@pytest.fixture(scope="session")
def real_ct() -> Path:
    return Path(str(files("med3dvlm") / "assets/scans/ct_abdomen_pelvis.nii.gz"))
