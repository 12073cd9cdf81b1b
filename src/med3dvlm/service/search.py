"""The search index that the service keeps: every ready study, with its report once it is signed.

An index is of one model, so each model has its own beside the others': after a change of model
`med3dvlm service reindex` fills the new one, and going back needs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any, TypeVar

import numpy as np
import psycopg

from med3dvlm.search import Hit, SearchIndex
from med3dvlm.search.database import place_of
from med3dvlm.search.index import make_entry
from med3dvlm.search.study import SearchIndexError, Study
from med3dvlm.service.database import Away
from med3dvlm.service.models import Models

T = TypeVar("T")


class NoSearchError(ValueError):
    """The service has no model that could search."""


class StudyIndex:
    """Studies by their id; may be used by many threads and processes."""

    def __init__(self, url: str, models: Models):
        self.url, self.models = url, models
        self.lock = Lock()
        self.opened: SearchIndex | None = None

    @property
    def model(self) -> Any:
        """The dual encoder.

        Raises:
            NoSearchError: if there is none.
        """
        if self.models.dual is None:
            raise NoSearchError(
                f"Model {self.models.settings.model!r} has no search part: set search_model."
            )
        return self.models.dual

    def put(self, study: Study, vector: np.ndarray) -> None:
        """Write a study, in place of an older entry of its path."""
        report = self.model.embed_texts(study.report)[0] if study.report else None
        entry = make_entry(study, vector, report)

        def put(index: SearchIndex) -> None:
            with self.lock:
                index.put([entry])

        self._with(put)

    def remove(self, path: str) -> None:
        def remove(index: SearchIndex) -> None:
            with self.lock:
                if index.table is not None:
                    index.remove([path])

        self._with(remove)

    def vector(self, path: str) -> np.ndarray | None:
        """(dim,) the embedding of an indexed study's scan."""

        def fetch(index: SearchIndex) -> np.ndarray | None:
            found = index.table.fetch([path]) if index.table is not None else {}
            return found[path].vector if path in found else None

        return self._with(fetch)

    def search(
        self,
        text: str | None,
        *,
        vector: np.ndarray | None = None,
        top: int,
        where: Sequence[str] = (),
    ) -> list[Hit]:
        """The studies that fit best; see :meth:`SearchIndex.search`."""

        def search(index: SearchIndex) -> list[Hit]:
            if index.table is None:
                return []
            return index.search(text, vector=vector, top=top, where=where)

        return self._with(search)

    def _with(self, act: Callable[[SearchIndex], T]) -> T:
        """What is done with the index; once more where its server has gone and come back.

        Raises:
            Away: where the server does not answer.
            SearchIndexError: for what cannot be answered, without telling where the index lies.
        """
        for attempt in (1, 2):
            try:
                return act(self._index())
            except (SearchIndexError, psycopg.Error) as error:
                if _is_away(error):
                    if attempt == 2:
                        raise Away("The search index does not answer.") from error
                    continue
                reason = str(error).replace(self._location(), "the search index")
                raise SearchIndexError(reason.replace(self.url, "the search index")) from error
        raise AssertionError  # the second attempt returns or raises

    def _index(self) -> SearchIndex:
        with self.lock:
            # another process may have written the first study since
            if self.opened is None or self.opened.table is None:
                location = self._location()
                there = place_of(location).read_head() is not None
                make = SearchIndex.open if there else SearchIndex.create
                self.opened = make(location, model=self.model)
            return self.opened

    def _location(self) -> str:
        weights = self.model.fingerprint()
        joint = "_" if "://" in self.url else "/"
        return f"{self.url}{joint}{weights}"


def _is_away(error: BaseException) -> bool:
    return isinstance(error, psycopg.OperationalError) or isinstance(
        error.__cause__, psycopg.OperationalError
    )
