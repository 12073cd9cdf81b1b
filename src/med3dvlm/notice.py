"""What stands under everything that a model wrote, and in place of what it is not sure of."""

from __future__ import annotations

from typing import Any

NOTICE = "Draft by a research model. Not a medical device; a clinician must check every word."
DEMO_NOTICE = (
    "The bundled demo model has only ever seen generated phantoms. About a real patient its "
    "words mean nothing."
)
CANNOT_TELL = "cannot tell"


def provenance(model: Any) -> dict[str, str]:
    """What made a result: the model, its weights' hash, its preparation's."""
    return {
        "model": model.label,
        "weights": model.fingerprint(),
        "preparation": model.preparation.fingerprint(),
    }


def notice_of(label: str) -> str:
    """The sentence that every result of a model carries, by the model's label."""
    return f"{NOTICE} {DEMO_NOTICE}" if label == "demo" else NOTICE
