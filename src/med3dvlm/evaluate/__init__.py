"""Measuring: scores as plain functions of predictions, tables, and what calls them."""

from med3dvlm.evaluate.findings import CT_RATE_TERMS, asserted, extract_findings
from med3dvlm.evaluate.report import baseline_table, crg_table, finding_table
from med3dvlm.evaluate.retrieval import Places, places_of_matches, retrieval_table
from med3dvlm.evaluate.statistics import interval, paired_test
from med3dvlm.evaluate.tables import Results, Table
from med3dvlm.evaluate.vqa import Answered, closed_table, letter_in, yes_no_table
from med3dvlm.evaluate.wording import wording_scores, wording_table
from med3dvlm.evaluate.zero_shot import classification_table, nearest_corner

__all__ = [
    "CT_RATE_TERMS",
    "Answered",
    "Places",
    "Results",
    "Table",
    "asserted",
    "baseline_table",
    "classification_table",
    "closed_table",
    "crg_table",
    "extract_findings",
    "finding_table",
    "interval",
    "letter_in",
    "nearest_corner",
    "paired_test",
    "places_of_matches",
    "retrieval_table",
    "wording_scores",
    "wording_table",
    "yes_no_table",
]
