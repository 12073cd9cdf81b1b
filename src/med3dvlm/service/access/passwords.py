"""Passwords: which are good enough, and how they are kept."""

from __future__ import annotations

import threading
from functools import cache

from argon2 import PasswordHasher
from argon2.exceptions import VerificationError
from zxcvbn import zxcvbn

LONGEST = 128
LEAST_SCORE = 3
"""Of zxcvbn's 0 to 4: 3 takes more than 10⁸ guesses by one who knows common passwords and names."""
OF_THE_PLACE = ("med3dvlm", "radiology", "radiologist", "hospital", "medical", "workstation")
_LOOKED_AT = 64  # characters that zxcvbn is given: it takes long on long ones

_HASHER = PasswordHasher()  # argon2id, 64 MiB, 3 passes (RFC 9106's second choice)
_AT_ONCE = threading.BoundedSemaphore(4)  # 64 MiB each


class PasswordError(ValueError):
    """A password that is not taken, with the reason."""


def check_password(password: str, *about: str, length: int) -> None:
    """Refuse a password that is short or easily guessed.

    Args:
        about: the account's names, of which a password must not be made.
        length: fewest characters.

    Raises:
        PasswordError: one sentence with what to do.
    """
    if len(password) < length:
        raise PasswordError(f"the password is too short: use {length} characters or more.")
    if len(password) > LONGEST:
        raise PasswordError(f"the password is too long: use at most {LONGEST} characters.")
    # words that contain others come first, so that nothing of a name is left over
    words = {word.lower() for name in about for word in (name, *name.split())} - {""}
    rest = password.lower()
    for word in sorted(words, key=len, reverse=True):
        rest = rest.replace(word, "") if len(word) > 2 else rest
    if len(rest) < length // 2:
        raise PasswordError("the password is made of the account's name: use something else.")
    found = zxcvbn(password[:_LOOKED_AT], user_inputs=[*words, *OF_THE_PLACE])
    if found["score"] < LEAST_SCORE:
        raise PasswordError("the password is easily guessed: use a few unrelated words.")


def hash_password(password: str) -> str:
    with _AT_ONCE:
        return _HASHER.hash(password)


def matches(stored: str | None, password: str) -> bool:
    """Whether it is the password; takes as long where there is none stored (an unknown name)."""
    if len(password) > LONGEST:
        password = ""
    with _AT_ONCE:
        try:
            _HASHER.verify(stored or _no_password(), password)
        except VerificationError:
            return False
    return stored is not None


def is_outdated(stored: str) -> bool:
    """Whether it was hashed with weaker settings than today's."""
    return _HASHER.check_needs_rehash(stored)


@cache
def _no_password() -> str:
    return _HASHER.hash("")
