"""Measuring: scores as plain functions of predictions, tables, and what calls them."""

from med3dvlm.evaluate.report import baseline_table, bleu1, finding_table, rouge1, wording_table
from med3dvlm.evaluate.retrieval import Places, places_of_matches, retrieval_table
from med3dvlm.evaluate.statistics import interval
from med3dvlm.evaluate.tables import Results, Table
from med3dvlm.evaluate.vqa import Answered, closed_table, letter_in, yes_no_table

__all__ = [
    "Answered",
    "Places",
    "Results",
    "Table",
    "baseline_table",
    "bleu1",
    "closed_table",
    "finding_table",
    "interval",
    "letter_in",
    "places_of_matches",
    "retrieval_table",
    "rouge1",
    "wording_table",
    "yes_no_table",
]
