"""`report` and `ask`: one scan, one result."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

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
)

ScanArgument = Annotated[
    str,
    typer.Argument(
        help="A DICOM folder, file or zip; NIfTI, NRRD, MHA or NPY; a folder of image slices.",
        metavar="SCAN",
    ),
]
SampleOption = Annotated[
    bool, typer.Option("--sample", help="Draw tokens instead of the likeliest.")
]
TemperatureOption = Annotated[float, typer.Option(min=0.01, help="With --sample.")]
TopPOption = Annotated[float, typer.Option(min=0.01, max=1.0, help="With --sample.")]


def report(
    scan: ScanArgument,
    model: ModelOption = "demo",
    picture: Annotated[
        Path | None, typer.Option(help="Write a PNG: three planes and the report.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write the report's text here.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Another instruction to the model.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest report, tokens.")] = 256,
    sample: SampleOption = False,
    temperature: TemperatureOption = 0.7,
    top_p: TopPOption = 0.9,
    series: SeriesOption = None,
    frame: FrameOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Draft a report about a scan.

    Example: `med3dvlm report chest/ --picture chest.png`
    """
    read = common.read_with_warnings(scan, series=series, frame=frame)
    vlm = common.load_language_model(model, device, precision)
    options = common.generation_options(
        sample=sample, temperature=temperature, top_p=top_p, seed=seed
    )
    text = vlm.report(
        read,
        prompt=prompt,
        max_new_tokens=max_tokens,
        streamer=None if as_json else _streamer(vlm),
        **options,
    )
    if output is not None:
        from med3dvlm.files import atomic_file

        with atomic_file(output) as temporary:
            temporary.write_text(text + "\n", "utf-8")
    if picture is not None:
        draw(read, text, picture, vlm)
    if as_json:
        common.print_json(_result(vlm, read, report=text, confidence=text.confidence))
    else:
        common.print_notice(vlm)


def ask(
    scan: ScanArgument,
    questions: Annotated[
        list[str],
        typer.Argument(
            metavar="QUESTION...", help="A question, in quotes; of several the scan is read once."
        ),
    ],
    choices: Annotated[
        list[str] | None,
        typer.Option("--choices", "-c", help="One possible answer; give the option for each."),
    ] = None,
    model: ModelOption = "demo",
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, tokens.")] = 128,
    sample: SampleOption = False,
    temperature: TemperatureOption = 0.7,
    top_p: TopPOption = 0.9,
    series: SeriesOption = None,
    frame: FrameOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Answer questions about a scan; with choices, score each by its likelihood.

    Example: `med3dvlm ask chest/ "Which side is the effusion on?" -c left -c right`
    """
    if not all(question.strip() for question in questions):
        raise typer.BadParameter("the question is empty: write one.")
    if choices is not None and len(choices) < 2:
        raise typer.BadParameter("one choice is no choice: give --choices at least twice.")
    read = common.read_with_warnings(scan, series=series, frame=frame)
    vlm = common.load_language_model(model, device, precision)
    options = common.generation_options(
        sample=sample, temperature=temperature, top_p=top_p, seed=seed
    )
    streamed = not as_json and not choices and len(questions) == 1
    answers = vlm.ask(
        read,
        questions,
        choices,
        max_new_tokens=max_tokens,
        streamer=_streamer(vlm) if streamed else None,
        **options,
    )
    if as_json:
        given = [_answer(*pair) for pair in zip(questions, answers, strict=True)]
        common.print_json(_result(vlm, read, **given[0] if len(given) == 1 else {"answers": given}))
        return
    for question, answer in zip(questions, answers, strict=True):
        if len(questions) > 1:
            typer.echo(question)
        if not streamed and not choices:
            typer.echo(answer)
        for choice, share in answer.choices:
            mark = "→" if share == answer.confidence else " "
            typer.echo(f"{mark} {share:6.1%}  {choice}")
    common.print_notice(vlm)


def _answer(question: str, answer: Any) -> dict[str, Any]:
    return {
        "question": question,
        "answer": answer,
        "confidence": answer.confidence,
        "choices": [{"choice": c, "confidence": p} for c, p in answer.choices],
    }


def _streamer(vlm: Any) -> Any:
    from transformers import TextStreamer

    return TextStreamer(vlm.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)


def draw(scan: Any, text: str, path: Path, vlm: Any) -> None:
    from med3dvlm.picture import draw_report

    draw_report(
        scan,
        text,
        path,
        title=Path(scan.source).name or scan.source,
        footer=f"Model {vlm.label} · weights {vlm.fingerprint()} · "
        f"preparation {vlm.preparation.fingerprint()}\n{common.notice(vlm)}",
    )
    common.errors.print(f"picture: {path}", markup=False, highlight=False)


def _result(vlm: Any, scan: Any, **result: Any) -> dict[str, Any]:
    return {
        "scan": scan.source,
        **result,
        **common.provenance(vlm),
        "warnings": list(scan.warnings),
        "notice": common.notice(vlm),
    }
