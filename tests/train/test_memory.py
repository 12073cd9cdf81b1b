"""The allocator while a model is trained."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys

import pytest
import torch

from med3dvlm.train.memory import freed_memory_kept


def pages_of_later_blocks() -> int:
    """Pages that the kernel made for eight blocks of 64 MiB, each freed before the next.

    Eight, as what is small may be cut from a freed block: the next one then needs new pages once.
    """
    torch.ones(2**24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc",
    reason="nothing is done without glibc, whose way of giving memory back is what is held up",
)
def test_freed_memory_is_used_again_while_it_is_kept():
    # in a process of its own: in one that freed much before, blocks come from what it still has
    command = [sys.executable, "-m", "tests.train.test_memory"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    before, during, after = (int(word) for word in answer.stdout.split())
    assert min(before, after) >= 8 * 2**26 // 2**21  # in pages of at most 2 MiB
    assert during < min(before, after) / 2


if __name__ == "__main__":
    print(pages_of_later_blocks())
    with freed_memory_kept():
        print(pages_of_later_blocks())
    print(pages_of_later_blocks())
