"""What the commands share: options, errors, progress, the notice under every result."""

from __future__ import annotations

import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass
from functools import wraps
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, get_type_hints

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from med3dvlm.notice import notice_of

if TYPE_CHECKING:
    from med3dvlm.models import Med3DVLM, VolumeTextDualEncoder
    from med3dvlm.scan import Scan

errors = Console(stderr=True)

ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="'demo', a checkpoint folder, or a hub name.")
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]
PrecisionOption = Annotated[
    str | None,
    typer.Option(help="fp32 or bf16, of the encoder; bf16 is faster, and differs by about 1%."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
SeedOption = Annotated[int, typer.Option(help="Seed of whatever is drawn at random.")]
SeriesOption = Annotated[
    str | None,
    typer.Option(help="Which DICOM series, by UID or number, where a folder holds several."),
]
FrameOption = Annotated[
    int | None, typer.Option(help="Which time point of a 4-D file, counted from 0.")
]


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Let a parameter that is a dataclass stand for its fields on the command line.

    Options that several commands have are written once, as such a dataclass. Typer reads the
    signature that is made here, in which the fields take the parameter's place.
    """
    hints, shown, groups = get_type_hints(command, include_extras=True), [], {}
    for name, parameter in inspect.signature(command).parameters.items():
        if is_dataclass(hints[name]):
            groups[name] = hints[name]
            shown += _parameters(hints[name])
        else:
            shown.append(parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=hints[name]))

    @wraps(command)
    def run(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        command(**given)

    run.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
    return run


def _parameters(group: type) -> list[Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        Parameter(
            field.name,
            Parameter.KEYWORD_ONLY,
            default=Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(group)
    ]


def fail(error: BaseException) -> NoReturn:
    """Print one sentence and leave with status 1; the traceback only where it is asked for."""
    if os.environ.get("MED3DVLM_TRACEBACK"):
        traceback.print_exception(error)
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename or 'a file'}: {error.strerror}."
    sys.stderr.write(f"Error: {text}\n")
    raise SystemExit(1)


def need_hospital() -> None:
    """Refuse in one sentence where the libraries for PACS and FHIR are missing."""
    try:
        import med3dvlm.hospital  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(f"this needs {error.name}: pip install 'med3dvlm[pacs]'.") from error


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def print_results(results: Any, as_json: bool) -> None:
    """Tables of figures, as JSON or as Markdown."""
    if as_json:
        print_json(results.to_dict())
    else:
        typer.echo(results.to_markdown())


def note(text: str) -> None:
    """A line on standard error, as it is."""
    errors.print(text, markup=False, highlight=False)


class RateColumn(ProgressColumn):
    """How many a second, averaged over the last steps."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.3g}/s", style="progress.data.speed")


@contextmanager
def progress_bar(label: str) -> Iterator[Any]:
    """A bar on standard error; yields a function of (done, total)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        RateColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task(label, total=None)

        def update(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield update


def read_text(path: Path) -> str:
    """
    Raises:
        ValueError: if it is not in UTF-8.
    """
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: it is no text in UTF-8.") from error


def read_with_warnings(path: str, *, series: str | None = None, frame: int | None = None) -> Scan:
    """Read a scan; what the reader noticed goes to standard error."""
    from med3dvlm.scan import read_scan

    with errors.status(f"reading {path}"):
        scan = read_scan(path, series=series, frame=frame)
    for warning in scan.warnings:
        errors.print(f"note: {warning}", style="yellow", markup=False, highlight=False)
    return scan


def load_language_model(name: str, device: str, precision: str | None = None) -> Med3DVLM:
    return _load(name, device, "language", precision)


def load_exact_language_model(name: str) -> Med3DVLM:
    """On the CPU and in the precision of the file, to be written in another form."""
    from med3dvlm.hub import CheckpointError, load_exact
    from med3dvlm.models import Med3DVLM

    model = load_exact(name, part="language")
    if not isinstance(model, Med3DVLM):
        raise CheckpointError(f"model {name!r} has no language model: give another.")
    return model


def load_dual_encoder(
    name: str, device: str, precision: str | None = None
) -> VolumeTextDualEncoder:
    return _load(name, device, "search", precision)


def _load(name: str, device: str, part: str, precision: str | None) -> Any:
    with errors.status(f"loading model {name}"):
        from med3dvlm.hub import load

        return load(name, part=part, device=device, precision=precision)


def notice(model: Any) -> str:
    """The sentence that every result carries."""
    return notice_of(model.label)


def print_notice(model: Any) -> None:
    errors.print(notice(model), style="dim", markup=False, highlight=False)
