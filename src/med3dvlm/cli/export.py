"""`export`: a report or an evidence map as what hospitals keep: DICOM, PDF, FHIR."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from med3dvlm.cli import common
from med3dvlm.cli.common import JsonOption, ModelOption, SeriesOption
from med3dvlm.notice import provenance

if TYPE_CHECKING:
    from med3dvlm.hospital import Report, SourceImages

app = typer.Typer(no_args_is_help=True, help="Write reports and evidence as DICOM, PDF or FHIR.")

# as med3dvlm.hospital.export has them, which imports much
REPORTS = ("sr", "basic-text-sr", "encapsulated-pdf", "pdf", "fhir", "text")
EVIDENCE = ("seg", "parametric-map")
SourceArgument = Annotated[
    str,
    typer.Argument(metavar="SCAN", help="The DICOM series it is about: folder, file or zip."),
]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="The file to write.")]


@app.command("report")
def report(
    scan: SourceArgument,
    text: Annotated[
        Path,
        typer.Argument(metavar="REPORT", help="Its text, or what 'report --json' printed."),
    ],
    output: OutputOption,
    to: Annotated[str, typer.Option("--to", help=", ".join(REPORTS) + ".")] = "sr",
    signed_by: Annotated[
        str | None,
        typer.Option(help="Who answers for it. A typed name verifies nothing: the service does."),
    ] = None,
    organization: Annotated[str, typer.Option(help="Where that person works.")] = "",
    language: Annotated[str | None, typer.Option(help="Of the text, such as en or de.")] = None,
    fhir_version: Annotated[str, typer.Option(help="r5 or r4.")] = "r5",
    font: Annotated[
        list[Path] | None, typer.Option(help="For PDF: a font for letters that DejaVu lacks.")
    ] = None,
    series: SeriesOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a report about a DICOM series as Structured Report, PDF, FHIR or text.

    Example: `med3dvlm export report chest/ report.json --to sr -o report.dcm`
    """
    if to not in REPORTS:
        raise typer.BadParameter(f"--to {to!r} is unknown: use {', '.join(REPORTS)}.")
    common.need_hospital()
    from med3dvlm.files import atomic_file
    from med3dvlm.hospital import Signature
    from med3dvlm.hospital.export import export_report

    signature = None
    if signed_by:
        signature = Signature(
            name=signed_by, signed=datetime.now(UTC), authenticated=False, organization=organization
        )
    read = _read_report(text, signature, language)
    source = _source(scan, series)
    made = export_report(read, source, to, fhir_version=fhir_version, fonts=font or ())
    with atomic_file(output) as temporary:
        temporary.write_bytes(made.data)
    _done(output, to, source, as_json=as_json, verified=read.verified)
    common.errors.print(read.notice, style="dim", markup=False, highlight=False)


@app.command("evidence")
def evidence(
    scan: SourceArgument,
    map_file: Annotated[
        str,
        typer.Argument(metavar="MAP", help="A NIfTI map that --evidence wrote."),
    ],
    output: OutputOption,
    to: Annotated[str, typer.Option("--to", help=" or ".join(EVIDENCE) + ".")] = "seg",
    about: Annotated[str, typer.Option(help="What it is the evidence for.")] = "report",
    model: ModelOption = "demo",
    series: SeriesOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write an evidence map as DICOM Segmentation or Parametric Map on the images' geometry.

    Example: `med3dvlm export evidence chest/ map.nii.gz --to seg -o evidence.dcm`
    """
    if to not in EVIDENCE:
        raise typer.BadParameter(f"--to {to!r} is unknown: use {' or '.join(EVIDENCE)}.")
    common.need_hospital()
    from med3dvlm.hospital import Model, parametric_map, save_object, segmentation

    source, values = _source(scan, series), common.read_with_warnings(map_file)
    who = Model.of(provenance(common.load_exact_language_model(model)))
    make = {"seg": segmentation, "parametric-map": parametric_map}[to]
    save_object(make(values, source, model=who, about=about), output)
    _done(output, to, source, as_json=as_json)


def _read_report(path: Path, signature: Any, language: str | None) -> Report:
    from med3dvlm.hospital import Report
    from med3dvlm.hospital.drafting import report_of_dict
    from med3dvlm.notice import NOTICE

    text = common.read_text(path)
    facts: dict[str, Any] = {"language": language} if language else {}
    if path.suffix.lower() == ".json":
        try:
            given = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path}: it is no JSON ({error}).") from error
        try:
            given = {**given, **facts} if isinstance(given, dict) else given
            return report_of_dict(given, signature=signature)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    when = signature.signed if signature else datetime.now(UTC)
    return Report.from_text(text, created=when, notice=NOTICE, signature=signature, **facts)


def _source(scan: str, series: str | None) -> SourceImages | None:
    from med3dvlm.hospital import read_source

    if not Path(scan).exists():
        raise ValueError(f"{scan}: there is no such file or folder; check the path.")
    return read_source(scan, series=series)


def _done(
    output: Path, to: str, source: SourceImages | None, *, as_json: bool, **facts: Any
) -> None:
    if as_json:
        images = len(source.headers) if source else 0
        common.print_json({"file": str(output), "format": to, "images": images, **facts})
    else:
        typer.echo(str(output))
