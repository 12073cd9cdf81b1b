"""What a map explains: one number for each volume, computed from the encoder's streams."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from med3dvlm.sentences import split_report

if TYPE_CHECKING:
    from med3dvlm.models import Med3DVLM, VolumeTextDualEncoder

Target = Callable[[list[Tensor]], Tensor]  # streams of B volumes -> (B,)


def token_log_probs(
    model: Med3DVLM, visual: Tensor, instruction: str, text: str
) -> tuple[Tensor, list[tuple[int, int]]]:
    """How likely each token of a text is after an instruction.

    Args:
        visual: (B, N, width) visual tokens.

    Returns:
        (B, tokens of the text) natural logarithms, and where in the text each token stands.
    """
    processor = model.processor
    batch = processor.training_batch([[(instruction, text)]]).to(model.device)
    spans = processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = [(int(start), int(end)) for start, end in spans["offset_mapping"]]
    model._check_length(batch["input_ids"].shape[1])
    logits = model(
        input_ids=batch["input_ids"].expand(len(visual), -1),
        attention_mask=batch["attention_mask"].expand(len(visual), -1),
        visual_tokens=visual,
        logits_to_keep=len(spans) + 2,
    ).logits[:, :-2]
    taken = batch["labels"][:, -len(spans) - 1 : -1].expand(len(visual), -1)
    log_probs = logits.float().log_softmax(-1).gather(-1, taken.unsqueeze(-1)).squeeze(-1)
    return log_probs, spans


def text_target(
    model: Med3DVLM,
    instruction: str,
    text: str,
    *,
    part: tuple[int, int] | None = None,
    others: Sequence[str] = (),
) -> Target:
    """The log-likelihood of a text, or of a part of it, as the model's answer.

    Args:
        part: (start, end) characters of the text that count, as of one sentence of a report.
        others: what could be said instead; their joint log-likelihood is subtracted. With them
            the map shows what speaks for this answer and against the others.

    Raises:
        ValueError: if no token of the text lies in the part.
    """
    low, high = part or (0, len(text))

    def likelihood(visual: Tensor, words: str, low: int, high: int) -> Tensor:
        log_probs, spans = token_log_probs(model, visual, instruction, words)
        counted = [i for i, (start, end) in enumerate(spans) if end > low and start < high]
        if not counted:
            raise ValueError(f"{words[low:high]!r} holds no word: there is nothing to explain.")
        return log_probs[:, counted].sum(1)

    def target(streams: list[Tensor]) -> Tensor:
        visual = model.project(*model.vision_encoder.streams(streams))
        value = likelihood(visual, text, low, high)
        if others:
            rest = [likelihood(visual, other, 0, len(other)) for other in others]
            value = value - torch.stack(rest).logsumexp(0)
        return value

    return target


def answer_target(
    model: Med3DVLM, question: str, answer: str, choices: Sequence[str] | None = None
) -> Target:
    """An answer that `ask` gave to a question, with the choices that it was given."""
    if choices is None:
        return text_target(model, question, answer)
    lettered = model.processor.lettered(choices)
    asked = model.processor.closed_question(question, choices)
    return text_target(model, asked, answer, others=[c for c in lettered if c != answer])


def report_targets(model: Med3DVLM, report: str, *, prompt: str | None = None) -> list[Target]:
    """One target for each sentence of `split_report(report)`, as it stands in that report."""
    instruction = prompt or model.config.report_prompt
    return [
        text_target(model, instruction, report, part=(sentence.start, sentence.end))
        for sentence in split_report(report)
    ]


def query_target(dual: VolumeTextDualEncoder, query: str | np.ndarray) -> Target:
    """The similarity of a volume to a text, or to an embedding (dim,) of any kind."""
    embedding = dual.embed_texts(query)[0] if isinstance(query, str) else query
    wanted = torch.from_numpy(np.asarray(embedding, np.float32)).to(dual.device)

    def target(streams: list[Tensor]) -> Tensor:
        pooled = dual.vision_encoder.pool(streams)
        return F.normalize(dual.vision_projection(pooled), dim=-1).float() @ wanted

    return target
