"""Tasks: from studies to predictions, tables, plots and a page, with evidence controls."""

from med3dvlm.evaluate.tasks.answerers import AlwaysNo, Answerer, LanguageModel, QuestionOnly
from med3dvlm.evaluate.tasks.calibration import evaluate_calibration
from med3dvlm.evaluate.tasks.cases import Cases, cases_of_phantoms, cases_of_store
from med3dvlm.evaluate.tasks.compare import compare_runs
from med3dvlm.evaluate.tasks.controls import Score, control_table, verdict
from med3dvlm.evaluate.tasks.evidence import evaluate_evidence
from med3dvlm.evaluate.tasks.predictions import evaluate_predictions, read_predictions
from med3dvlm.evaluate.tasks.report import Search, evaluate_report
from med3dvlm.evaluate.tasks.retrieval import evaluate_retrieval
from med3dvlm.evaluate.tasks.run import Example, Run
from med3dvlm.evaluate.tasks.twins import evaluate_twins, make_pairs
from med3dvlm.evaluate.tasks.vqa import evaluate_vqa
from med3dvlm.evaluate.tasks.wording import load_bert_score, load_scorer
from med3dvlm.evaluate.tasks.zero_shot import evaluate_zero_shot, fit_calibration

__all__ = [
    "AlwaysNo",
    "Answerer",
    "Cases",
    "Example",
    "LanguageModel",
    "QuestionOnly",
    "Run",
    "Score",
    "Search",
    "cases_of_phantoms",
    "cases_of_store",
    "compare_runs",
    "control_table",
    "evaluate_calibration",
    "evaluate_evidence",
    "evaluate_predictions",
    "evaluate_report",
    "evaluate_retrieval",
    "evaluate_twins",
    "evaluate_vqa",
    "evaluate_zero_shot",
    "fit_calibration",
    "load_bert_score",
    "load_scorer",
    "make_pairs",
    "read_predictions",
    "verdict",
]
