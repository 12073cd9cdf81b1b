"""The real app with an account and a key of every role."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from argon2 import PasswordHasher
from fastapi import FastAPI
from fastapi.testclient import TestClient

from med3dvlm.service.access import Identity, keys, passwords, sessions, users
from med3dvlm.service.access.permissions import ROLES
from med3dvlm.service.access.tables import User
from med3dvlm.service.app import create_app
from med3dvlm.service.database import new_id
from med3dvlm.service.settings import load_settings

PASSWORD = "umbrella-gravel-41-tango"
KEEPER = Identity("keeper", "Keeper", "administrator", "local")


def make_app(data: Path, **settings) -> FastAPI:
    return create_app(load_settings(data=data, environment={}, **settings))


class Place:
    """An app and ways to talk to it."""

    def __init__(self, app: FastAPI):
        self.app, self.database, self.settings = app, app.state.database, app.state.settings

    def client(self, **options) -> TestClient:
        """Of nobody, in particular of no cookie."""
        options = {"base_url": "http://localhost", "client": ("127.0.0.1", 50000), **options}
        return TestClient(self.app, **options)

    def add_user(self, name: str, role: str) -> User:
        length = self.settings.password_length
        return users.add_user(
            self.database, KEEPER, name, role=role, password=PASSWORD, password_length=length
        )

    def signed_in(self, name: str, **options) -> TestClient:
        """A browser with a session of that user, and the page's CSRF header."""
        client = self.client(**options)
        with self.database.session() as session:
            user = session.get(User, name)
            found = sessions.start(session, user, self.settings, address="127.0.0.1")
        client.cookies.set("med3dvlm_session", found.token)
        client.headers["X-CSRF-Token"] = found.csrf
        return client

    def with_key(self, name: str, role: str) -> TestClient:
        """A program with a new key."""
        client = self.client()
        _, token = keys.add_key(self.database, KEEPER, name, role=role, days=1)
        client.headers["Authorization"] = f"Bearer {token}"
        return client


@pytest.fixture(scope="session", autouse=True)
def quick_hashes() -> Iterator[None]:
    """Passwords are hashed with little memory: the strength is `test_the_hash_is_strong`'s."""
    strong = passwords._HASHER
    passwords._HASHER = PasswordHasher(time_cost=1, memory_cost=64, parallelism=1)
    passwords._no_password.cache_clear()
    yield
    passwords._HASHER = strong
    passwords._no_password.cache_clear()


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """With the accounts reader, reviewer, administrator and service: their role is their name.

    Of the whole session: tests leave these four as they are.
    """
    place = Place(make_app(tmp_path_factory.mktemp("service"), sign_ins_per_min=10_000))
    for role in ROLES:
        place.add_user(role, role)
    yield place
    place.database.close()


@pytest.fixture
def ann(place: Place) -> str:
    """The name of a reader whom nobody else knows."""
    name = f"ann-{new_id()[:8]}"
    place.add_user(name, "reader")
    return name


@pytest.fixture
def new_place(tmp_path: Path) -> Iterator[Callable[..., Place]]:
    """Makes an app of its own, without accounts."""
    made: list[Place] = []

    def make(**settings) -> Place:
        made.append(Place(make_app(tmp_path / str(len(made)), **settings)))
        return made[-1]

    yield make
    for one in made:
        one.database.close()
