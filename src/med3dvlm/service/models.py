"""The models of a process, loaded when first used, and the scans that they saw last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from threading import RLock
from typing import TYPE_CHECKING, Any

from med3dvlm.hub import CheckpointError, load
from med3dvlm.notice import provenance
from med3dvlm.service.settings import Settings, SettingsError

if TYPE_CHECKING:
    from torch import Tensor

    from med3dvlm.models import Med3DVLM, VolumeTextDualEncoder
    from med3dvlm.scan import Scan


class Models:
    """The language model, and the dual encoder that the search needs."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.lock = RLock()

    @property
    def language(self) -> Med3DVLM:
        with self.lock:
            return self._language

    @property
    def dual(self) -> VolumeTextDualEncoder | None:
        """None where the checkpoint has no such part."""
        with self.lock:
            return self._dual

    @cached_property
    def _language(self) -> Any:
        settings = self.settings
        model = load(
            settings.model, part="language", device=settings.device, precision=settings.precision
        )
        if settings.threshold is not None and model.calibration is None:
            raise SettingsError(
                f"threshold is {settings.threshold}, but model {settings.model!r} is not "
                "calibrated: fit it with 'med3dvlm evaluate calibration --save', or set none."
            )
        return model

    @cached_property
    def _dual(self) -> Any:
        settings = self.settings
        name = settings.search_model or settings.model
        try:
            return load(name, part="search", device=settings.device, precision=settings.precision)
        except CheckpointError:
            if settings.search_model:
                raise
            return None

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What made a result: the model, its weights' hash, its preparation's; as of the CLI."""
        model = self.language
        return {**provenance(model), "calibrated": model.calibration is not None}

    @cached_property
    def _seen(self) -> Any:
        from med3dvlm.models.decoding import Recent
        from med3dvlm.models.med3dvlm import SCANS_KEPT

        return Recent(SCANS_KEPT)

    def see(self, voxels: Sequence[str], scan: Callable[[int], Scan]) -> Tensor:
        """Visual tokens (n, N, width) of n studies, known by the hash of their voxels.

        Args:
            scan: reads one of them, by its place; called for those that were not seen of late.
        """
        import torch

        def look(places: list[int]) -> list[Tensor]:
            return [self.language.see(scan(place))[0] for place in places]

        return torch.stack(self._seen.get(list(voxels), look))
