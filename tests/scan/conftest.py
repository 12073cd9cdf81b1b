"""Fixtures for the tests of reading, preparing and writing scans."""

import pytest

from med3dvlm.scan import Scan
from tests.scan.samples import make_scan


@pytest.fixture
def scan() -> Scan:
    return make_scan()
