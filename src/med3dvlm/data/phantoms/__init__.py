"""Phantom studies: CT-like volumes from a seed, whose truth is known, with texts and questions."""

from med3dvlm.data.phantoms.anatomy import PHASES, PLANES
from med3dvlm.data.phantoms.finding import Finding, PlacedFinding
from med3dvlm.data.phantoms.findings import FINDINGS, ORGANS
from med3dvlm.data.phantoms.language import (
    PHANTOM_TERMS,
    Question,
    ask_where,
    ask_whether,
    find_findings,
    is_true,
)
from med3dvlm.data.phantoms.layouts import LAYOUTS
from med3dvlm.data.phantoms.study import (
    CONCEPTS,
    PHANTOM_VERSION,
    SPLITS,
    PhantomError,
    PhantomStudy,
    PhantomTruth,
    concept_vector,
    describe,
    make_study,
    twin,
)
from med3dvlm.data.phantoms.write import write_studies, write_study

__all__ = [
    "CONCEPTS",
    "FINDINGS",
    "LAYOUTS",
    "ORGANS",
    "PHANTOM_TERMS",
    "PHANTOM_VERSION",
    "PHASES",
    "PLANES",
    "SPLITS",
    "Finding",
    "PhantomError",
    "PhantomStudy",
    "PhantomTruth",
    "PlacedFinding",
    "Question",
    "ask_where",
    "ask_whether",
    "concept_vector",
    "describe",
    "find_findings",
    "is_true",
    "make_study",
    "twin",
    "write_studies",
    "write_study",
]
