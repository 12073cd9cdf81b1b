"""`classify`: findings of a scan with probabilities, from prompts or from a trained probe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from med3dvlm.cli import common
from med3dvlm.cli.common import DeviceOption, FrameOption, JsonOption, ModelOption, SeriesOption
from med3dvlm.cli.read import ScanArgument
from med3dvlm.notice import provenance

PresentOption = Annotated[
    list[str] | None, typer.Option(help="Prompt for a finding that is there; repeatable.")
]
AbsentOption = Annotated[
    list[str] | None, typer.Option(help="Prompt for one that is not; as many as --present.")
]
BESIDE = "findings_calibration.json"  # in a model's folder


def classify(
    scan: ScanArgument,
    labels: Annotated[
        list[str] | None,
        typer.Option(
            "--labels",
            "-l",
            help="A finding, several with commas, a text file of one a line, or a known list: "
            "ct-rate, phantoms. Repeatable.",
        ),
    ] = None,
    probe: Annotated[
        Path | None, typer.Option(help="A folder of train probe, in place of --labels.")
    ] = None,
    present: PresentOption = None,
    absent: AbsentOption = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="A file of train calibration; that in the model's folder by default."),
    ] = None,
    model: ModelOption = "demo",
    series: SeriesOption = None,
    frame: FrameOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Findings with probabilities, without training for them, or from a trained probe.

    Example: `med3dvlm classify chest/ --labels "pleural effusion, cardiomegaly"`
    """
    if (probe is None) == (not labels):
        raise typer.BadParameter("say what to look for: --labels, or --probe.")
    names = _names(labels or ())
    prompts = prompt_pairs(present, absent)
    if prompts and calibration:
        raise typer.BadParameter("a calibration holds its own prompts: leave --present out.")
    read = common.read_with_warnings(scan, series=series, frame=frame)
    dual = common.load_dual_encoder(model, device)
    if probe is not None:
        found, how = _from_probe(dual, read, probe)
    else:
        fitted = None if prompts else _calibration(dual, model, calibration)
        found, how = _from_prompts(dual, read, names, prompts, fitted)
    found = dict(sorted(found.items(), key=lambda item: -item[1]))
    if as_json:
        shown = [{"finding": name, "probability": value} for name, value in found.items()]
        common.print_json(
            {
                "scan": read.source,
                "findings": shown,
                **how,
                **provenance(dual),
                "warnings": list(read.warnings),
                "notice": common.notice(dual),
            }
        )
        return
    for name, value in found.items():
        typer.echo(f"{value:6.1%}  {name}")
    if not how["calibrated"]:
        common.errors.print(
            "These are scores, not probabilities: no calibration was fitted for this model "
            "(med3dvlm train calibration).",
            highlight=False,
        )
    common.print_notice(dual)


def prompt_pairs(present: list[str] | None, absent: list[str] | None) -> list[tuple[str, str]]:
    """Prompts as they were given; none if none were."""
    if len(present or ()) != len(absent or ()):
        raise typer.BadParameter("--present and --absent go in pairs: give as many of both.")
    return list(zip(present or (), absent or (), strict=True))


def _names(given: list[str] | tuple[str, ...]) -> list[str]:
    from med3dvlm.data.phantoms import FINDINGS
    from med3dvlm.evaluate.findings import CT_RATE_TERMS

    lists = {"ct-rate": list(CT_RATE_TERMS), "phantoms": list(FINDINGS)}
    names: list[str] = []
    for text in given:
        if text in lists:
            names += lists[text]
        elif Path(text).is_file():
            names += common.read_text(Path(text)).splitlines()
        else:
            names += text.split(",")
    names = list(dict.fromkeys(name.strip() for name in names if name.strip()))
    if given and not names:
        raise typer.BadParameter("the labels are empty: name at least one finding.")
    return names


def _calibration(dual: Any, model: str, path: Path | None) -> Any:
    from med3dvlm.evaluate.calibration import Calibration
    from med3dvlm.hub import resolve

    if path is None:
        folder = resolve(model)
        beside = [p for p in (folder / BESIDE, folder / "dual_encoder" / BESIDE) if p.is_file()]
        if not beside:
            return None
        path = beside[0]
    fitted = Calibration.load(path)
    fitted.check_model(dual)
    return fitted


def _from_prompts(
    dual: Any, scan: Any, names: list[str], prompts: list[tuple[str, str]], calibration: Any
) -> tuple[dict[str, float], dict[str, Any]]:
    from med3dvlm.evaluate.tasks.zero_shot import PROMPTS, prompt_embeddings, prompt_probabilities

    pairs = list(calibration.prompts if calibration else prompts or PROMPTS)
    vectors = dual.embed_scans(scan)
    given = prompt_probabilities(dual, vectors, prompt_embeddings(dual, names, pairs))
    if calibration:
        given = calibration.apply(names, given)
    how: dict[str, Any] = {"method": "prompts", "prompts": pairs, "calibrated": bool(calibration)}
    if calibration:
        others = [name for name in names if name.lower() not in calibration.findings]
        how["calibrated by all findings together"] = others
    return dict(zip(names, map(float, given[0]), strict=True)), how


def _from_probe(dual: Any, scan: Any, folder: Path) -> tuple[dict[str, float], dict[str, Any]]:
    from med3dvlm.train.probe import Probe

    probe = Probe.load(folder)
    probe.check_model(dual)
    given = probe.probabilities(dual.embed_scans(scan))
    found = dict(zip(probe.labels, map(float, given[0]), strict=True))
    return found, {"method": "probe", "probe": str(folder), "calibrated": True}
