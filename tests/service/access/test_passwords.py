"""Which passwords are good enough."""

import pytest

from med3dvlm.service.access.passwords import PasswordError, check_password


@pytest.mark.parametrize(
    ("password", "reason"),
    [
        ("short", "too short"),
        ("x" * 129, "too long"),
        ("password1234", "easily guessed"),
        ("P@ssw0rd12345", "easily guessed"),
        ("qwertyuiop12", "easily guessed"),
        ("aaaaaaaaaaaaaaaa", "easily guessed"),
        ("med3dvlm2026", "easily guessed"),
        ("ann.miller1234", "account's name"),
        ("MillerMiller1", "account's name"),
    ],
)
def test_refused(password, reason):
    with pytest.raises(PasswordError, match=reason):
        check_password(password, "ann.miller", "Ann Miller", length=12)


@pytest.mark.parametrize(
    "password",
    ["correct horse battery", "Tr7#kd92Lmq!", "Überall blühen gelbe Rüben", "x9" * 3 + "Kq!7vTz"],
)
def test_taken(password):
    check_password(password, "ann.miller", "Ann Miller", length=12)
