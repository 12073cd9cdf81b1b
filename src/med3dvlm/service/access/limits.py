"""How often one may ask, and how much one may send."""

from __future__ import annotations

import asyncio
import ipaddress
import threading
import time
from collections import OrderedDict

from fastapi import HTTPException
from starlette.types import Message, Receive

MOST_KEYS = 20_000
SILENT_S = 60
"""A sender who is silent for so long in the middle of a body is gone."""


class Buckets:
    """A token bucket for each key: `per_min` a minute, of which a quarter at once.

    Of this process only: with N processes, one may ask N times as often.
    """

    def __init__(self, per_min: float):
        self.rate = per_min / 60
        self.size = max(5.0, per_min / 4)
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()  # level, time
        self._lock = threading.Lock()

    def wait(self, key: str) -> float:
        """Take one; 0, or the seconds after which there is one again."""
        now = time.monotonic()
        with self._lock:
            level, then = self._levels.pop(key, (self.size, now))
            level = min(self.size, level + (now - then) * self.rate)
            taken = level >= 1
            self._levels[key] = (level - 1 if taken else level, now)
            if len(self._levels) > MOST_KEYS:
                self._levels.popitem(last=False)
        return 0.0 if taken else (1 - level) / self.rate


def network_of(address: str) -> str:
    """What is counted as one sender: an IPv4 address, or a /64 of IPv6."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)


def limited(receive: Receive, most: int) -> Receive:
    """`receive` that refuses more than `most` bytes of body, and a sender who falls silent.

    What is counted is what comes, so that a body without a length, or longer than it said, is
    cut off, too.
    """
    got, complete = 0, False

    async def receive_limited() -> Message:
        nonlocal got, complete
        if complete:  # what still comes is that the client left: that may take as long as it will
            return await receive()
        try:
            async with asyncio.timeout(SILENT_S):
                message = await receive()
        except TimeoutError as error:
            raise HTTPException(
                408, "The request stopped coming; send it again.", {"Connection": "close"}
            ) from error
        if message["type"] == "http.request":
            got += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if got > most:
                raise too_large(most)
        return message

    return receive_limited


def too_large(most: int) -> HTTPException:
    size = f"{most / 2**20:.0f} MB" if most >= 2**20 else f"{most / 2**10:.0f} kB"
    return HTTPException(
        413, f"The request is larger than {size}; send less at a time.", {"Connection": "close"}
    )
