"""`report` and `ask`: one scan, one result."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from med3dvlm.cli import common
from med3dvlm.cli.common import (
    DeviceOption,
    FrameOption,
    JsonOption,
    ModelOption,
    PrecisionOption,
    SeedOption,
    SeriesOption,
    grouped,
)
from med3dvlm.notice import CANNOT_TELL, provenance

if TYPE_CHECKING:
    from med3dvlm.models import Med3DVLM
    from med3dvlm.scan import Scan

ScanArgument = Annotated[
    str,
    typer.Argument(
        help="A DICOM folder, file or zip; NIfTI, NRRD, MHA or NPY; a folder of image slices.",
        metavar="SCAN",
    ),
]
ThresholdOption = Annotated[
    float | None,
    typer.Option(
        min=0, max=1, help='Say "cannot tell" where the calibrated confidence is lower: 0.7.'
    ),
]
MethodOption = Annotated[
    str,
    typer.Option(
        "--evidence-method", help="layercam, grad-cam, integrated-gradients or occlusion (slow)."
    ),
]
METHODS = ("layercam", "grad-cam", "integrated-gradients", "occlusion")


@dataclass(frozen=True)
class OneScanOptions:
    """How a scan is read, and how a model writes about it."""

    sample: Annotated[
        bool, typer.Option("--sample", help="Draw tokens instead of the likeliest.")
    ] = False
    temperature: Annotated[float, typer.Option(min=0.01, help="With --sample.")] = 0.7
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0, help="With --sample.")] = 0.9
    series: SeriesOption = None
    frame: FrameOption = None
    device: DeviceOption = "auto"
    precision: PrecisionOption = None
    seed: SeedOption = 0
    as_json: JsonOption = False

    def read(self, scan: str) -> Scan:
        return common.read_with_warnings(scan, series=self.series, frame=self.frame)

    def load(self, model: str) -> Med3DVLM:
        return common.load_language_model(model, self.device, self.precision)

    def generation(self) -> dict[str, Any]:
        """Options of `generate`: greedy unless sampling is asked for."""
        if not self.sample:
            return {}
        import torch

        torch.manual_seed(self.seed)
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}


@grouped
def report(
    scan: ScanArgument,
    model: ModelOption = "demo",
    picture: Annotated[
        Path | None, typer.Option(help="Write a PNG: three planes and the report.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write the report's text here.")
    ] = None,
    evidence: Annotated[
        Path | None,
        typer.Option(
            help="Write what the sentences rest on: a folder gets a NIfTI map for each, a name "
            "that ends in .nii or .nii.gz one map of the whole report."
        ),
    ] = None,
    evidence_method: MethodOption = "layercam",
    threshold: ThresholdOption = None,
    prompt: Annotated[str | None, typer.Option(help="Another instruction to the model.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest report, tokens.")] = 256,
    *,
    options: OneScanOptions,
) -> None:
    """Draft a report about a scan.

    Example: `med3dvlm report chest/ --picture chest.png --evidence chest-evidence/`
    """
    _check_method(evidence_method)
    read = options.read(scan)
    vlm = options.load(model)
    _check_calibration(vlm, threshold)
    seen = vlm.see(read)
    drafted = vlm.report(
        seen,
        prompt=prompt,
        max_new_tokens=max_tokens,
        streamer=None if options.as_json or threshold is not None else _streamer(vlm),
        **options.generation(),
    )
    rated = _rate(vlm, seen, drafted)
    text = str(drafted)
    if threshold is not None:
        from med3dvlm.evidence import with_withheld

        text = with_withheld(text, rated, threshold)
        if not options.as_json:
            typer.echo(text)
    overlay = None
    if evidence is not None:
        overlay = _report_maps(
            vlm, read, drafted, prompt, evidence_method, evidence, drawn=picture is not None
        )
    if output is not None:
        from med3dvlm.files import atomic_file

        with atomic_file(output) as temporary:
            temporary.write_text(text + "\n", "utf-8")
    if picture is not None:
        draw(read, text, picture, vlm, evidence=overlay)
    if options.as_json:
        sentences = [_sentence(one, threshold) for one in rated]
        common.print_json(
            _result(vlm, read, report=text, confidence=drafted.confidence, sentences=sentences)
        )
    else:
        common.print_notice(vlm)


@grouped
def ask(
    scan: ScanArgument,
    questions: Annotated[
        list[str],
        typer.Argument(
            metavar="QUESTION", help="A question, in quotes; of several the scan is read once."
        ),
    ],
    choices: Annotated[
        list[str] | None,
        typer.Option("--choices", "-c", help="One possible answer; give the option for each."),
    ] = None,
    model: ModelOption = "demo",
    evidence: Annotated[
        Path | None, typer.Option(help="Write a NIfTI map of what the answer rests on.")
    ] = None,
    evidence_method: MethodOption = "layercam",
    threshold: ThresholdOption = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, tokens.")] = 128,
    *,
    options: OneScanOptions,
) -> None:
    """Answer questions about a scan; with choices, score each by its likelihood.

    Example: `med3dvlm ask chest/ "Which side is the effusion on?" -c left -c right`
    """
    if not all(question.strip() for question in questions):
        raise typer.BadParameter("the question is empty: write one.")
    if choices is not None and len(choices) < 2:
        raise typer.BadParameter("one choice is no choice: give --choices at least twice.")
    _check_method(evidence_method)
    if evidence is not None and not _is_nifti(evidence):
        raise typer.BadParameter(f"--evidence {evidence}: one map is written as .nii or .nii.gz.")
    if evidence is not None and len(questions) > 1:
        raise typer.BadParameter("--evidence is of one answer: ask one question at a time.")
    read = options.read(scan)
    vlm = options.load(model)
    _check_calibration(vlm, threshold)
    streamed = not options.as_json and not choices and threshold is None and len(questions) == 1
    answers = vlm.ask(
        read,
        questions,
        choices,
        max_new_tokens=max_tokens,
        streamer=_streamer(vlm) if streamed else None,
        **options.generation(),
    )
    if evidence is not None:
        from med3dvlm.evidence import answer_target

        target = answer_target(vlm, questions[0], answers[0], choices)
        _save_map(vlm, read, target, evidence_method, evidence)
    given = [
        _answer(vlm, question, answer, threshold)
        for question, answer in zip(questions, answers, strict=True)
    ]
    if options.as_json:
        common.print_json(_result(vlm, read, **given[0] if len(given) == 1 else {"answers": given}))
        return
    for one in given if not streamed else ():
        if len(questions) > 1:
            typer.echo(one["question"])
        _print_answer(one, threshold)
    common.print_notice(vlm)


def _answer(vlm: Any, question: str, answer: Any, threshold: float | None) -> dict[str, Any]:
    """What is said of an answer; one that is less sure than `threshold` is withheld."""
    confidence, shares = _confidence(vlm, answer)
    withheld = threshold is not None and confidence < threshold
    scored = zip(answer.choices, shares, strict=True)
    return {
        "question": question,
        "answer": CANNOT_TELL if withheld else answer,
        "confidence": confidence,
        "calibrated": vlm.calibration is not None,
        "choices": [{"choice": choice, "confidence": p} for (choice, _), p in scored],
        **({"withheld": answer} if withheld else {}),
    }


def _print_answer(one: dict[str, Any], threshold: float | None) -> None:
    confidence, choices = one["confidence"], one["choices"]
    if "withheld" in one:
        typer.echo(f"{CANNOT_TELL} (confidence {confidence:.0%}, below {threshold:.0%})")
    elif choices:
        most = max(choice["confidence"] for choice in choices)
        for choice in choices:
            mark = "→" if choice["confidence"] == most else " "
            typer.echo(f"{mark} {choice['confidence']:6.1%}  {choice['choice']}")
    elif threshold is not None:
        typer.echo(f"{one['answer']} (confidence {confidence:.0%})")
    else:
        typer.echo(one["answer"])


def _streamer(vlm: Any) -> Any:
    from transformers import TextStreamer

    return TextStreamer(vlm.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)


def _check_method(method: str) -> None:
    if method not in METHODS:
        raise typer.BadParameter(
            f"--evidence-method {method!r} is unknown: use {', '.join(METHODS)}."
        )


def _is_nifti(path: Path) -> bool:
    return path.name.lower().endswith((".nii", ".nii.gz"))


def _check_calibration(vlm: Any, threshold: float | None) -> None:
    """A threshold needs a confidence that means something: refused before anything is written."""
    if threshold is not None:
        from med3dvlm.evidence import calibration_of

        calibration_of(vlm)


def _confidence(vlm: Any, answer: Any) -> tuple[float, list[float]]:
    """Of an answer and of each of its choices: calibrated where the model is."""
    if vlm.calibration is None:
        return answer.confidence, [share for _, share in answer.choices]
    from med3dvlm.evidence import answer_confidence, choice_shares

    shares = choice_shares(vlm.calibration, answer) if answer.choices else []
    return answer_confidence(vlm.calibration, answer), shares


def _rate(vlm: Any, seen: Any, text: str) -> list[Any]:
    """The report's sentences with their confidence; none for a model that is not calibrated."""
    if vlm.calibration is None:
        return []
    from med3dvlm.evidence import rate_report

    return rate_report(vlm, seen, text)


def _sentence(rated: Any, threshold: float | None) -> dict[str, Any]:
    return {
        "text": rated.sentence.text,
        "section": rated.sentence.section,
        "confidence": rated.confidence,
        "withheld": rated.withheld(threshold),
    }


def _report_maps(
    vlm: Any, scan: Any, text: str, prompt: str | None, method: str, path: Path, *, drawn: bool
) -> Any:
    """Write the map of a report, or of each sentence; give the former if it is to be drawn."""
    from med3dvlm.evidence import explain, save_report_maps, text_target

    target = text_target(vlm, prompt or vlm.config.report_prompt, text)
    if _is_nifti(path):
        return _save_map(vlm, scan, target, method, path)
    with common.progress_bar("explaining") as progress:
        save_report_maps(vlm, scan, text, path, prompt=prompt, method=method, progress=progress)
    common.note(f"evidence: {path}")
    return explain(vlm, scan, target, method=method) if drawn else None


def _save_map(vlm: Any, scan: Any, target: Any, method: str, path: Path) -> Any:
    from med3dvlm.evidence import as_scan, explain
    from med3dvlm.scan import save_nifti

    values = explain(vlm, scan, target, method=method)
    save_nifti(as_scan(scan, values), path)
    common.note(f"evidence: {path}")
    return values


def draw(scan: Any, text: str, path: Path, vlm: Any, *, evidence: Any = None) -> None:
    from med3dvlm.picture import draw_report

    made = provenance(vlm)
    draw_report(
        scan,
        text,
        path,
        evidence=evidence,
        title=Path(scan.source).name or scan.source,
        footer=f"Model {made['model']} · weights {made['weights']} · "
        f"preparation {made['preparation']}\n{common.notice(vlm)}",
    )
    common.note(f"picture: {path}")


def _result(vlm: Any, scan: Any, **result: Any) -> dict[str, Any]:
    return {
        "scan": scan.source,
        **result,
        **provenance(vlm),
        "warnings": list(scan.warnings),
        "notice": common.notice(vlm),
    }
