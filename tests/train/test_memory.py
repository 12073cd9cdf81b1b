"""The allocator while a model is trained."""

from __future__ import annotations

import resource
import sys

import pytest
import torch

from med3dvlm.train.memory import freed_memory_kept


def pages_of_a_second_block() -> int:
    """Pages that the kernel made for a block of 64 MiB, after one of that size was freed."""
    torch.ones(2**24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc gives blocks back at once")
def test_freed_memory_is_used_again_while_it_is_kept():
    with freed_memory_kept():
        assert pages_of_a_second_block() < 100
    assert pages_of_a_second_block() >= 2**26 // 2**21  # in pages of at most 2 MiB
