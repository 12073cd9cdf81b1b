"""What a model is asked for a report or a caption, in more than one wording."""

from __future__ import annotations

REPORT_PROMPTS = (
    "Please write a radiology report for this scan.",
    "Draft the findings and the impression of this scan.",
    "Describe this scan as a radiologist would.",
    "What does this scan show? Answer with a full report.",
    "Report on this study.",
    "Write down all findings in this volume, then an impression.",
)
CAPTION_PROMPTS = (
    "Please describe this scan in one sentence.",
    "Summarise this scan in one line.",
    "What is the most important in this scan? One sentence.",
    "Give a short caption for this volume.",
)
