"""Measuring: scores as plain functions of predictions, tables, and what calls them."""

from med3dvlm.evaluate.report import finding_table
from med3dvlm.evaluate.retrieval import ranks_of_matches, recall_at, retrieval_table
from med3dvlm.evaluate.statistics import interval
from med3dvlm.evaluate.tables import Results, Table
from med3dvlm.evaluate.vqa import Answered, closed_table, letter_in, yes_no_table

__all__ = [
    "Answered",
    "Results",
    "Table",
    "closed_table",
    "finding_table",
    "interval",
    "letter_in",
    "ranks_of_matches",
    "recall_at",
    "retrieval_table",
    "yes_no_table",
]
