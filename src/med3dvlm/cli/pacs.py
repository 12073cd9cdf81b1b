"""`pacs`: find, get, send and watch over DICOMweb."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from med3dvlm.cli import common
from med3dvlm.cli.common import DeviceOption, JsonOption, ModelOption, PrecisionOption, grouped

if TYPE_CHECKING:
    from med3dvlm.hospital import FoundStudy, Pacs

app = typer.Typer(
    no_args_is_help=True,
    help="Talk to a PACS over DICOMweb. Its password or token comes from the environment: "
    "MED3DVLM_PACS_PASSWORD, MED3DVLM_PACS_TOKEN.",
)

STUDY_COLUMNS = ("StudyDate", "PatientID", "PatientName", "ModalitiesInStudy", "StudyDescription")
SERIES_COLUMNS = ("Modality", "SeriesDescription")


@dataclass(frozen=True)
class PacsOptions:
    """Where the PACS is, and who asks."""

    url: Annotated[
        str,
        typer.Option(envvar="MED3DVLM_PACS_URL", help="DICOMweb service: https://pacs/dicom-web."),
    ] = ""
    user: Annotated[str, typer.Option(envvar="MED3DVLM_PACS_USER", help="With a password.")] = ""
    ca: Annotated[
        Path | None,
        typer.Option(envvar="MED3DVLM_PACS_CA", help="PEM file of who signed its certificate."),
    ] = None
    certificate: Annotated[
        Path | None, typer.Option(envvar="MED3DVLM_PACS_CERTIFICATE", help="PEM, of the client.")
    ] = None
    key: Annotated[
        Path | None, typer.Option(envvar="MED3DVLM_PACS_KEY", help="PEM, of the client.")
    ] = None

    def connect(self) -> Pacs:
        if not self.url:
            raise typer.BadParameter("say where the PACS is: --url, or MED3DVLM_PACS_URL.")
        common.need_hospital()
        from med3dvlm.hospital import Pacs, PacsAddress

        secrets = {
            name: os.environ.get(f"MED3DVLM_PACS_{name.upper()}", "")
            for name in ("password", "token")
        }
        return Pacs(PacsAddress(**vars(self), **secrets))


@app.command("find")
@grouped
def find(
    where: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEYWORD=VALUE",
            help="DICOM keywords; * stands for any letters, dates may be 20250101-20250131.",
        ),
    ] = None,
    series: Annotated[bool, typer.Option("--series", help="List their series, too.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="Most studies.")] = 100,
    *,
    at: PacsOptions,
    as_json: JsonOption = False,
) -> None:
    """List the studies of a PACS that fit.

    Example: `med3dvlm pacs find PatientID=4711 ModalitiesInStudy=CT StudyDate=20250101-`
    """
    filters = dict(_pair(one) for one in where or ())
    with at.connect() as pacs:
        found = pacs.find(limit=limit, **filters)
        listed = [(study, pacs.series(study.study_uid) if series else []) for study in found]
    if as_json:
        common.print_json([_facts(study, parts, series) for study, parts in listed])
        return
    for study, parts in listed:
        typer.echo(_line(study.study_uid, study, STUDY_COLUMNS))
        for one in parts:
            typer.echo("    " + _line(one.series_uid, one, SERIES_COLUMNS))
    if not found:
        common.note("no study fits.")


@app.command("get")
@grouped
def get(
    study: Annotated[str, typer.Argument(metavar="STUDY_UID", help="StudyInstanceUID.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for its files.")],
    series: Annotated[str | None, typer.Option(help="Only this series, by its UID.")] = None,
    *,
    at: PacsOptions,
    as_json: JsonOption = False,
) -> None:
    """Fetch a study, or one series of it, into a folder.

    Example: `med3dvlm pacs get 1.2.826.0.1.3680043 -o study/`
    """
    with at.connect() as pacs:
        with common.progress_bar("fetching") as progress:
            count = pacs.get(study, output, series_uid=series, progress=progress)
    if as_json:
        common.print_json({"study": study, "series": series, "folder": str(output), "files": count})
    else:
        typer.echo(f"{output}: {count} files")


@app.command("send")
@grouped
def send(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH", help="DICOM files, or folders of them.")
    ],
    *,
    at: PacsOptions,
    as_json: JsonOption = False,
) -> None:
    """Store DICOM files in a PACS; the same file is stored once.

    Example: `med3dvlm pacs send report.dcm`
    """
    files = [file for path in paths for file in _files(path)]
    with at.connect() as pacs:
        with common.progress_bar("sending") as progress:
            count = pacs.send(files, progress=progress)
    if as_json:
        common.print_json({"pacs": str(pacs.address), "sent": count})
    else:
        typer.echo(f"{pacs.address}: {count} objects stored")


@app.command("watch")
@grouped
def watch(
    rules: Annotated[Path, typer.Argument(metavar="RULES.yaml", help="Which studies are taken.")],
    state: Annotated[Path, typer.Option(help="Remembers what was taken.")] = Path("watch.db"),
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Draft here, into a folder a study.")
    ] = None,
    service: Annotated[
        str | None,
        typer.Option(help="Send to this service, which drafts; key: MED3DVLM_SERVICE_KEY."),
    ] = None,
    service_ca: Annotated[
        Path | None, typer.Option(help="PEM file of who signed the service's certificate.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="How the service drafts: generate, retrieve or template.")
    ] = "generate",
    once: Annotated[bool, typer.Option("--once", help="Look once, as a timer would.")] = False,
    model: ModelOption = "demo",
    device: DeviceOption = "auto",
    precision: PrecisionOption = None,
    *,
    at: PacsOptions,
    as_json: JsonOption = False,
) -> None:
    """Draft reports about new studies of a PACS, each once, also after a restart.

    Example: `med3dvlm pacs watch rules.yaml --service https://localhost:8000`
    """
    if (output is None) == (service is None):
        raise typer.BadParameter("say where drafts go: either --output or --service.")
    common.need_hospital()
    from med3dvlm.hospital.drafting import IntoFolder, IntoService
    from med3dvlm.hospital.watch import Watcher, read_rules

    followed = read_rules(rules)
    with at.connect() as pacs:
        if service is not None:
            secret = os.environ.get("MED3DVLM_SERVICE_KEY", "")
            draft = IntoService(service, key=secret, ca=service_ca, method=method)
        else:
            draft = IntoFolder(common.load_language_model(model, device, precision), output)
        watcher = Watcher(pacs, followed, state, draft, say=common.note)
        try:
            if not once:
                watcher.run()
            drafted = watcher.look()
            entries = [entry for entry in watcher.memory.entries() if entry.uid in drafted]
        finally:
            watcher.close()
    if as_json:
        common.print_json([{"study_uid": one.uid, **vars(one)} for one in entries])
    else:
        typer.echo(f"{len(entries)} drafted")


def _pair(text: str) -> tuple[str, str]:
    keyword, equals, value = text.partition("=")
    if not equals or not value:
        raise typer.BadParameter(f"{text!r} is no KEYWORD=VALUE, such as PatientID=4711.")
    return keyword, value


def _files(path: Path) -> list[Path]:
    from med3dvlm.scan.dicom_series import is_dicom

    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    found = [file for file in files if is_dicom(file)]
    if not found:
        raise ValueError(f"{path}: there is no DICOM file; give files, or a folder of them.")
    return found


def _facts(study: FoundStudy, parts: list[FoundStudy], wanted: bool) -> dict[str, Any]:
    series = {"series": [one.as_dict() for one in parts]} if wanted else {}
    return {**study.as_dict(), **series}


def _line(uid: str, found: FoundStudy, columns: tuple[str, ...]) -> str:
    from med3dvlm.hospital.report import one_line  # headers may hold anything, for a terminal, too

    facts = [one_line(str(found.header.get(keyword, "") or "-"), 80) for keyword in columns]
    return "  ".join([uid, *facts, f"{found.images if found.images is not None else '?'} images"])
