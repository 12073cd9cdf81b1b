"""`serve`, `work` and `service …`: the workstation's server, its workers, its upkeep."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from med3dvlm.cli import common
from med3dvlm.cli.access import ConfigOption, DatabaseOption, DataOption
from med3dvlm.cli.common import JsonOption

if TYPE_CHECKING:
    from med3dvlm.service.core import Service

app = typer.Typer(no_args_is_help=True, help="The service's database, files and index.")

ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", help="'demo', a checkpoint folder, or a hub name.")
]
StorageOption = Annotated[str | None, typer.Option(help="Folder, or s3://bucket/prefix.")]
IndexOption = Annotated[str | None, typer.Option(help="Folder, or postgresql://…#name.")]
DeviceOption = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1 …")]


def serve(
    config: ConfigOption = None,
    host: Annotated[str | None, typer.Option(help="Address to bind; 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to bind; 8000.")] = None,
    model: ModelOption = None,
    data: DataOption = None,
    database: DatabaseOption = None,
    storage: StorageOption = None,
    index: IndexOption = None,
    device: DeviceOption = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Worker processes; 0: none here, as med3dvlm work runs elsewhere; not "
            "given: a thread of the server.",
        ),
    ] = None,
    tls_certificate: Annotated[Path | None, typer.Option(help="PEM file, to serve HTTPS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key.")] = None,
) -> None:
    """Serve the workstation: the page, the API, and a worker.

    Example: `med3dvlm serve --data /srv/med3dvlm`
    """
    run, settings = _run(
        config,
        host=host,
        port=port,
        model=model,
        data=data,
        database=database,
        storage=storage,
        index=index,
        device=device,
        workers=workers,
        tls_certificate=tls_certificate,
        tls_key=tls_key,
    )
    run.serve(settings)


def work(
    config: ConfigOption = None,
    model: ModelOption = None,
    data: DataOption = None,
    database: DatabaseOption = None,
    storage: StorageOption = None,
    index: IndexOption = None,
    device: DeviceOption = None,
    metrics_port: Annotated[int | None, typer.Option(help="Serve Prometheus there.")] = None,
) -> None:
    """Do the jobs of a server that runs elsewhere, with the same settings.

    Example: `med3dvlm work --database postgresql://med3dvlm@db/med3dvlm --device cuda:1`
    """
    run, settings = _run(
        config,
        model=model,
        data=data,
        database=database,
        storage=storage,
        index=index,
        device=device,
        metrics_port=metrics_port,
    )
    run.work(settings)


@app.command()
def migrate(
    config: ConfigOption = None, data: DataOption = None, database: DatabaseOption = None
) -> None:
    """Bring the database to the schema of this version; `serve` does it by itself.

    Example: `med3dvlm service migrate --data /srv/med3dvlm`
    """
    from med3dvlm.service.migrations import migrate

    with _opened(config, data=data, database=database) as service:
        before = migrate(service.database)
    typer.echo(f"The schema is current; it was {before or 'empty'}.")


@app.command()
def backup(
    folder: Annotated[Path, typer.Argument(help="Of the backup; an older one is brought on.")],
    config: ConfigOption = None,
    data: DataOption = None,
    database: DatabaseOption = None,
    storage: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write every table and file into a folder, while the service runs.

    Example: `med3dvlm service backup /backup/med3dvlm --data /srv/med3dvlm`
    """
    from med3dvlm.service.backup import back_up

    with _opened(config, data=data, database=database, storage=storage) as service:
        about = back_up(service, folder)
    _tell(about, as_json, f"{folder}: {sum(about['tables'].values())} rows, "
          f"{about['files_copied']} new files.")  # fmt: skip


@app.command()
def restore(
    folder: Annotated[Path, typer.Argument(help="Of the backup.")],
    config: ConfigOption = None,
    data: DataOption = None,
    database: DatabaseOption = None,
    storage: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bring a backup back, into an empty database; it may be of another kind.

    Example: `med3dvlm service restore /backup/med3dvlm --data /srv/new`
    """
    from med3dvlm.service.backup import restore

    with _opened(config, data=data, database=database, storage=storage) as service:
        about = restore(service, folder)
    _tell(about, as_json, f"Restored what was backed up {about['created']}; the workers will "
          "make the search index.")  # fmt: skip


@app.command()
def reindex(
    config: ConfigOption = None, data: DataOption = None, database: DatabaseOption = None
) -> None:
    """Let the workers put every study into the search index, as after a change of model.

    Example: `med3dvlm service reindex --data /srv/med3dvlm`
    """
    from med3dvlm.service.backup import reindex

    with _opened(config, data=data, database=database) as service:
        typer.echo(f"{reindex(service)} studies wait to be indexed.")


@app.command()
def corrections(
    folder: Annotated[Path, typer.Argument(help="For the manifest and the volumes.")],
    config: ConfigOption = None,
    data: DataOption = None,
    database: DatabaseOption = None,
    storage: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write signed reports with their volumes, as `med3dvlm prepare folder` takes them.

    Example: `med3dvlm service corrections signed/ --data /srv/med3dvlm`
    """
    from med3dvlm.service.corrections import write_corrections

    with _opened(config, data=data, database=database, storage=storage) as service:
        count = write_corrections(service, folder)
    _tell({"studies": count, "folder": str(folder)}, as_json, f"{folder}: {count} studies.")


def _tell(value: Any, as_json: bool, sentence: str) -> None:
    if as_json:
        common.print_json(value)
    else:
        typer.echo(sentence)


def _run(config: Path | None, **given: Any) -> tuple[Any, Any]:
    _needed()
    from med3dvlm.service import run
    from med3dvlm.service.settings import load_settings

    run.set_up_logging()
    return run, load_settings(config, **given)


@contextmanager
def _opened(config: Path | None, **given: Any) -> Iterator[Service]:
    _needed()
    from med3dvlm.service.core import Service
    from med3dvlm.service.database import UNREACHABLE
    from med3dvlm.service.settings import load_settings

    service = Service.open(load_settings(config, **given))
    try:
        yield service
    except UNREACHABLE as error:
        reason = " ".join(str(error.__cause__ or error).split())[:160]
        raise OSError(f"the database does not answer ({reason}): is it running?") from error
    finally:
        service.close()


def _needed() -> None:
    try:
        import fastapi
        import sqlalchemy  # noqa: F401

        del fastapi
    except ImportError as error:
        raise ValueError("the service needs its extra: pip install 'med3dvlm[service]'.") from error
