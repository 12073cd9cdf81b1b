"""`serve`, `work` and `service …`: the workstation's server, its workers, its upkeep."""

from __future__ import annotations

import getpass
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from med3dvlm.cli import common
from med3dvlm.cli.common import JsonOption, grouped

if TYPE_CHECKING:
    from med3dvlm.service.access import Identity
    from med3dvlm.service.core import Service
    from med3dvlm.service.database import Database
    from med3dvlm.service.settings import Settings

app = typer.Typer(no_args_is_help=True, help="The service's database, files and index.")

StorageOption = Annotated[str | None, typer.Option(help="Folder, or s3://bucket/prefix.")]


@dataclass(frozen=True)
class ServiceOptions:
    """Where the service's settings and things are."""

    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="YAML file of the service's settings.")
    ] = None
    data: Annotated[Path | None, typer.Option(help="The service's folder.")] = None
    database: Annotated[str | None, typer.Option(help="sqlite:///file or postgresql://…")] = None

    def settings(self, **given: Any) -> Settings:
        """The settings, with what else was given on the command line."""
        _needed()
        from med3dvlm.service.settings import load_settings

        options = {name: value for name, value in vars(self).items() if name != "config"}
        return load_settings(self.config, **options, **given)

    @contextmanager
    def opened(self, **given: Any) -> Iterator[Service]:
        """The whole service, as its server has it."""
        settings = self.settings(**given)
        from med3dvlm.service.core import Service

        service = Service.open(settings)
        with _answering():
            try:
                yield service
            finally:
                service.close()

    @contextmanager
    def opened_database(self) -> Iterator[tuple[Settings, Database]]:
        """The settings and the database alone, in the schema of this version."""
        settings = self.settings()
        from med3dvlm.service.database import Database
        from med3dvlm.service.migrations import migrate

        database = Database(settings.database_url)
        with _answering():
            try:
                migrate(database)
                yield settings, database
            finally:
                database.close()


@dataclass(frozen=True)
class RunOptions(ServiceOptions):
    """What the server and a worker are run with."""

    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="'demo', a checkpoint folder, or a hub name."),
    ] = None
    storage: StorageOption = None
    index: Annotated[str | None, typer.Option(help="Folder, or postgresql://…#name.")] = None
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1 …")] = None


@grouped
def serve(
    options: RunOptions,
    host: Annotated[str | None, typer.Option(help="Address to bind; 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to bind; 8000.")] = None,
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
    settings = options.settings(
        host=host,
        port=port,
        workers=workers,
        tls_certificate=tls_certificate,
        tls_key=tls_key,
    )
    from med3dvlm.service import run

    run.set_up_logging()
    run.serve(settings)


@grouped
def work(
    options: RunOptions,
    metrics_port: Annotated[int | None, typer.Option(help="Serve Prometheus there.")] = None,
) -> None:
    """Do the jobs of a server that runs elsewhere, with the same settings.

    Example: `med3dvlm work --database postgresql://med3dvlm@db/med3dvlm --device cuda:1`
    """
    settings = options.settings(metrics_port=metrics_port)
    from med3dvlm.service import run

    run.set_up_logging()
    run.work(settings)


@app.command()
@grouped
def migrate(where: ServiceOptions) -> None:
    """Bring the database to the schema of this version; `serve` does it by itself.

    Example: `med3dvlm service migrate --data /srv/med3dvlm`
    """
    from med3dvlm.service.migrations import migrate

    with where.opened() as service:
        before = migrate(service.database)
    typer.echo(f"The schema is current; it was {before or 'empty'}.")


@app.command()
@grouped
def backup(
    folder: Annotated[Path, typer.Argument(help="Of the backup; an older one is brought on.")],
    storage: StorageOption = None,
    *,
    where: ServiceOptions,
    as_json: JsonOption = False,
) -> None:
    """Write every table and file into a folder, while the service runs.

    Example: `med3dvlm service backup /backup/med3dvlm --data /srv/med3dvlm`
    """
    from med3dvlm.service.backup import back_up

    with where.opened(storage=storage) as service:
        about = back_up(service, folder)
    _tell(about, as_json, f"{folder}: {sum(about['tables'].values())} rows, "
          f"{about['files_copied']} new files.")  # fmt: skip


@app.command()
@grouped
def restore(
    folder: Annotated[Path, typer.Argument(help="Of the backup.")],
    storage: StorageOption = None,
    *,
    where: ServiceOptions,
    as_json: JsonOption = False,
) -> None:
    """Bring a backup back, into an empty database; it may be of another kind.

    Example: `med3dvlm service restore /backup/med3dvlm --data /srv/new`
    """
    from med3dvlm.service.backup import restore

    with where.opened(storage=storage) as service:
        about = restore(service, folder)
    _tell(about, as_json, f"Restored what was backed up {about['created']}; the workers will "
          "make the search index.")  # fmt: skip


@app.command()
@grouped
def reindex(where: ServiceOptions) -> None:
    """Let the workers put every study into the search index, as after a change of model.

    Example: `med3dvlm service reindex --data /srv/med3dvlm`
    """
    from med3dvlm.service.backup import reindex

    with where.opened() as service:
        typer.echo(f"{reindex(service)} studies wait to be indexed.")


@app.command()
@grouped
def corrections(
    folder: Annotated[Path, typer.Argument(help="For the manifest and the volumes.")],
    storage: StorageOption = None,
    *,
    where: ServiceOptions,
    as_json: JsonOption = False,
) -> None:
    """Write signed reports with their volumes, as `med3dvlm prepare folder` takes them.

    Example: `med3dvlm service corrections signed/ --data /srv/med3dvlm`
    """
    from med3dvlm.service.corrections import write_corrections
    from med3dvlm.service.migrations import current_revision

    with where.opened(storage=storage) as service:
        current_revision(service.database)
        count = write_corrections(service, folder, local_person())
    _tell({"studies": count, "folder": str(folder)}, as_json, f"{folder}: {count} studies.")


def _tell(value: Any, as_json: bool, sentence: str) -> None:
    if as_json:
        common.print_json(value)
    else:
        typer.echo(sentence)


def local_person() -> Identity:
    """Who runs this command, for the log."""
    from med3dvlm.service.access import Identity

    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        name = str(os.getuid())
    return Identity(f"cli:{name}", name, "administrator", "local")


@contextmanager
def _answering() -> Iterator[None]:
    """Say in one sentence that the database does not answer."""
    from med3dvlm.service.database import UNREACHABLE

    try:
        yield
    except UNREACHABLE as error:
        reason = " ".join(str(error.__cause__ or error).split())[:160]
        raise OSError(f"the database does not answer ({reason}): is it running?") from error


def _needed() -> None:
    try:
        import fastapi
        import sqlalchemy  # noqa: F401

        del fastapi
    except ImportError as error:
        raise ValueError("the service needs its extra: pip install 'med3dvlm[service]'.") from error
