"""The search index that the service keeps: every ready study, with its report once it is signed.

An index is of one model, so each model has its own beside the others': after a change of model
`med3dvlm service reindex` fills the new one, and going back needs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import Any

import numpy as np

from med3dvlm.search import Hit, SearchIndex
from med3dvlm.search.database import place_of
from med3dvlm.search.index import make_entry
from med3dvlm.search.study import SearchIndexError, Study
from med3dvlm.service.models import Models


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
        index = self._index()
        with self.lock:
            index.put([make_entry(study, vector, report)])

    def remove(self, path: str) -> None:
        index = self._index()
        with self.lock:
            if index.table is not None:
                index.remove([path])

    def vector(self, path: str) -> np.ndarray | None:
        """(dim,) the embedding of an indexed study's scan."""
        table = self._index().table
        found = table.fetch([path]) if table is not None else {}
        return found[path].vector if path in found else None

    def search(
        self,
        text: str | None,
        *,
        vector: np.ndarray | None = None,
        top: int,
        where: Sequence[str] = (),
    ) -> list[Hit]:
        """The studies that fit best; see :meth:`SearchIndex.search`."""
        index = self._index()
        if index.table is None:
            return []
        return index.search(text, vector=vector, top=top, where=where)

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


__all__ = ["NoSearchError", "SearchIndexError", "StudyIndex"]
