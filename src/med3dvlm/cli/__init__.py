"""The command line: thin commands over the functions of the package.

Exit status: 0 done, 1 failed, 2 wrong usage. Results go to standard output, everything else to
standard error. Heavy imports happen inside the commands, after their arguments were checked.
"""

from __future__ import annotations

import os
import sys

# Tokenizers warns about forking otherwise; nothing here forks after using one.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import typer

from med3dvlm.cli import (
    access,
    archive,
    benchmark,
    classify,
    demo,
    evaluate,
    experiment,
    export,
    models,
    pacs,
    phantoms,
    read,
    service,
    store,
    train,
)
from med3dvlm.cli.common import fail

app = typer.Typer(
    name="med3dvlm",
    help="Connect 3D medical scans (CT, MR) with language. Research use only; every draft needs "
    "a clinician's check.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from med3dvlm import __version__

        typer.echo(f"med3dvlm {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and leave."
    ),
) -> None:
    pass


app.command("demo")(demo.demo)
app.command("report")(read.report)
app.command("ask")(read.ask)
app.command("classify")(classify.classify)
app.add_typer(archive.index_app, name="index")
app.command("search")(archive.search)
app.command("prepare")(store.prepare)
app.add_typer(store.data_app, name="data")
app.command("phantoms")(phantoms.phantoms)
app.add_typer(train.app, name="train")
app.add_typer(evaluate.app, name="evaluate")
app.command("experiment")(experiment.experiment)
app.add_typer(models.app, name="model")
app.add_typer(benchmark.app, name="benchmark")
app.command("serve")(service.serve)
app.command("work")(service.work)
app.add_typer(service.app, name="service")
app.add_typer(access.users_app, name="users")
app.add_typer(access.keys_app, name="keys")
app.add_typer(access.audit_app, name="audit")
app.add_typer(export.app, name="export")
app.add_typer(pacs.app, name="pacs")


def main() -> None:
    """Run the command line; known faults become one sentence and exit status 1."""
    try:
        app()
    except (ValueError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped.\n")
        raise SystemExit(130) from None
