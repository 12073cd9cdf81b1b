"""What the server and the workers share: settings, database, files, models, index."""

from __future__ import annotations

from dataclasses import dataclass

from med3dvlm.service.database import Database
from med3dvlm.service.models import Models
from med3dvlm.service.search import StudyIndex
from med3dvlm.service.settings import Settings
from med3dvlm.service.storage import Storage, open_storage


@dataclass(frozen=True)
class Service:
    """Everything that a request or a job is done with."""

    settings: Settings
    database: Database
    storage: Storage
    models: Models
    index: StudyIndex

    @classmethod
    def open(cls, settings: Settings) -> Service:
        models = Models(settings)
        return cls(
            settings,
            Database(settings.database_url),
            open_storage(settings.storage_url, settings.data / "cache"),
            models,
            StudyIndex(settings.index_url, models),
        )

    def close(self) -> None:
        self.database.close()
