"""`users`, `keys` and `audit`: accounts of the service, and its log, from its own machine."""

from __future__ import annotations

import getpass
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from med3dvlm.cli import common
from med3dvlm.cli.common import JsonOption

if TYPE_CHECKING:
    from med3dvlm.service.access import Identity
    from med3dvlm.service.database import Database
    from med3dvlm.service.settings import Settings

users_app = typer.Typer(no_args_is_help=True, help="The service's accounts.")
keys_app = typer.Typer(no_args_is_help=True, help="The service's API keys.")
audit_app = typer.Typer(no_args_is_help=True, help="The service's audit log.")

ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="YAML file of the service's settings.")
]
DataOption = Annotated[Path | None, typer.Option(help="The service's folder.")]
DatabaseOption = Annotated[str | None, typer.Option(help="sqlite:///file or postgresql://…")]
NameArgument = Annotated[str, typer.Argument(help="Name of the account.")]
RoleOption = Annotated[
    str, typer.Option(help="reader, reviewer, administrator or service.", show_default=False)
]


@contextmanager
def _opened(
    config: Path | None, data: Path | None, database: str | None
) -> Iterator[tuple[Settings, Database]]:
    """The service's settings and database, in the schema of this version."""
    from med3dvlm.service.database import UNREACHABLE, Database
    from med3dvlm.service.migrations import migrate
    from med3dvlm.service.settings import load_settings

    settings = load_settings(config, data=data, database=database)
    opened = Database(settings.database_url)
    try:
        migrate(opened)
        yield settings, opened
    except UNREACHABLE as error:
        reason = " ".join(str(error.__cause__ or error).split())[:160]
        raise OSError(f"the database does not answer ({reason}): is it running?") from error
    finally:
        opened.close()


def _by() -> Identity:
    """Who runs this command, for the log."""
    from med3dvlm.service.access import Identity

    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        name = str(os.getuid())
    return Identity(f"cli:{name}", name, "administrator", "local")


def _ask_password() -> str:
    """From the terminal, twice, unseen; else the first line of standard input."""
    if not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\r\n")
    password = getpass.getpass("Password: ")
    if getpass.getpass("Again: ") != password:
        raise ValueError("the two passwords differ: try again.")
    return password


# --- users ----------------------------------------------------------------------------------


@users_app.command("add")
def add_user(
    name: NameArgument,
    role: RoleOption,
    display_name: Annotated[str, typer.Option(help="As signatures show it.")] = "",
    config: ConfigOption = None,
    data: DataOption = None,
    database: DatabaseOption = None,
) -> None:
    """Make an account; the password is asked for, or is the first line of standard input.

    Example: `med3dvlm users add ann --role reviewer --display-name "Dr. Ann Miller"`
    """
    from med3dvlm.service.access import users

    with _opened(config, data, database) as (settings, opened):
        user = users.add_user(
            opened,
            _by(),
            name,
            role=role,
            password=_ask_password(),
            display_name=display_name,
            password_length=settings.password_length,
        )
    typer.echo(f"{user.name}: {user.role}")


@users_app.command("list")
def list_users(
    as_json: JsonOption = False,
    config: ConfigOption = None,
    data: DataOption = None,
    database: DatabaseOption = None,
) -> None:
    """List the accounts.

    Example: `med3dvlm users list`
    """
    from med3dvlm.service.access import users

    with _opened(config, data, database) as (_, opened), opened.reading() as session:
        rows = [users.public(user) for user in users.list_users(session)]
    columns = ("name", "display_name", "role", "sign_in", "created", "disabled")
    _print_table(rows, columns, as_json)


@users_app.command("role")
def change_role(
    name: NameArgument,
    role: Annotated[str, typer.Argument(help="reader, reviewer, administrator or service.")],
    config: ConfigOption = None,
    data: DataOption = None,
    database: DatabaseOption = None,
) -> None:
    """Give an account another role; it must sign in again.

    Example: `med3dvlm users role ann reader`
    """
    from med3dvlm.service.access import users

    with _opened(config, data, database) as (_, opened):
        user = users.change_user(opened, _by(), name, role=role)
    typer.echo(f"{user.name}: {user.role}")


@users_app.command("disable")
def disable_user(
    name: NameArgument,
    undo: Annotated[bool, typer.Option("--undo", help="Let it in again.")] = False,
    config: ConfigOption = None,
    data: DataOption = None,
    database: DatabaseOption = None,
) -> None:
    """Shut an account out at once. Its name stays taken, since signatures and the log name it.

    Example: `med3dvlm users disable ann`
    """
    from med3dvlm.service.access import keys, users

    with _opened(config, data, database) as (_, opened):
        user = users.change_user(opened, _by(), name, disabled=not undo)
        with opened.reading() as session:
            left = [key.name for key in keys.list_keys(session) if key.created_by == user.name
                    and key.revoked is None]  # fmt: skip
    typer.echo(f"{user.name}: {'let in again' if undo else 'disabled'}")
    if left and not undo:
        common.errors.print(f"note: API keys that {user.name} made still work: {', '.join(left)}")


@users_app.command("password")
def change_password(
    name: NameArgument,
    config: ConfigOption = None,
    data: DataOption = None,
    database: DatabaseOption = None,
) -> None:
    """Give an account another password, asked for or the first line of standard input.

    Example: `med3dvlm users password ann`
    """
    from med3dvlm.service.access import users

    with _opened(config, data, database) as (settings, opened):
        password = _ask_password()
        length = settings.password_length
        users.set_password(opened, _by(), name, password, password_length=length)
    typer.echo(f"{name}: password changed, signed out everywhere")


# --- keys -----------------------------------------------------------------------------------


@keys_app.command("add")
def add_key(
    name: Annotated[str, typer.Argument(help="What the key is for.")],
    role: RoleOption,
    days: Annotated[float, typer.Option(help="Until it ends; at most 366.")] = 90,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    data: DataOption = None,
    database: DatabaseOption = None,
) -> None:
    """Make a key and print it, this one time.

    Example: `med3dvlm keys add pacs-router --role service --days 180`
    """
    from med3dvlm.service.access import keys

    with _opened(config, data, database) as (_, opened):
        key, token = keys.add_key(opened, _by(), name, role=role, days=days)
    if as_json:
        common.print_json(_jsonable({**keys.public(key), "key": token}))
        return
    typer.echo(token)
    common.errors.print(
        f"Key {key.name}, {key.role}, until {key.expires:%Y-%m-%d}. Keep it: it is not shown again."
    )


@keys_app.command("list")
def list_keys(
    as_json: JsonOption = False,
    config: ConfigOption = None,
    data: DataOption = None,
    database: DatabaseOption = None,
) -> None:
    """List the keys, without the keys themselves.

    Example: `med3dvlm keys list`
    """
    from med3dvlm.service.access import keys

    with _opened(config, data, database) as (_, opened), opened.reading() as session:
        rows = [keys.public(key) for key in keys.list_keys(session)]
    columns = ("name", "role", "hint", "created_by", "expires", "used", "revoked")
    _print_table(rows, columns, as_json)


@keys_app.command("revoke")
def revoke_key(
    key: Annotated[str, typer.Argument(help="Its name or id.")],
    config: ConfigOption = None,
    data: DataOption = None,
    database: DatabaseOption = None,
) -> None:
    """End a key at once.

    Example: `med3dvlm keys revoke pacs-router`
    """
    from med3dvlm.service.access import keys

    with _opened(config, data, database) as (_, opened):
        found = keys.revoke_key(opened, _by(), key)
    typer.echo(f"{found.name}: revoked")


# --- audit ----------------------------------------------------------------------------------


@audit_app.command("verify")
def verify(
    expected: Annotated[
        str | None,
        typer.Option(help="ROW:HASH that an earlier verify printed; notices a cut-off end."),
    ] = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    data: DataOption = None,
    database: DatabaseOption = None,
) -> None:
    """Go through the log's chain of hashes; names the first row that is not as it was written.

    Example: `med3dvlm audit verify`
    """
    from dataclasses import asdict

    from med3dvlm.service import audit

    noted = _row_and_hash(expected) if expected else None
    with _opened(config, data, database) as (_, opened), opened.reading() as session:
        verdict = audit.verify(session, expected=noted)
    if as_json:
        common.print_json({"sound": verdict.sound, **asdict(verdict)})
    elif verdict.sound:
        typer.echo(f"{verdict.rows} rows, all sound; note this: {verdict.rows}:{verdict.hash}")
    else:
        _broken(f"the log is not sound. {verdict.reason}")
    if not verdict.sound:
        raise typer.Exit(1)


def _row_and_hash(text: str) -> tuple[int, str]:
    row, _, hash = text.partition(":")
    if not row.isdecimal() or len(hash) != 64:
        raise typer.BadParameter(f"--expected {text!r} is not ROW:HASH, as verify prints it.")
    return int(row), hash


def _broken(sentence: str) -> NoReturn:
    common.fail(ValueError(sentence))


@audit_app.command("export")
def export(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSONL file; standard output without.")
    ] = None,
    after: Annotated[int, typer.Option(min=0, help="Only rows after this one.")] = 0,
    config: ConfigOption = None,
    data: DataOption = None,
    database: DatabaseOption = None,
) -> None:
    """Write the log as JSON lines, one a row, with the hashes. The export itself is noted in it.

    Example: `med3dvlm audit export -o audit.jsonl`
    """
    from med3dvlm.files import atomic_file
    from med3dvlm.service import audit

    with _opened(config, data, database) as (_, opened):
        with opened.session() as session:
            audit.record(session, _by(), "audit.export", "audit", after=after)
        with opened.reading() as session:
            lines = (
                json.dumps(row.public(), ensure_ascii=False) + "\n"
                for row in audit.rows_after(session, after)
            )
            if output is None:
                sys.stdout.writelines(lines)
                return
            with atomic_file(output) as temporary, temporary.open("w", encoding="utf-8") as file:
                file.writelines(lines)
    typer.echo(f"{output}: written")


# --- printing -------------------------------------------------------------------------------


def _jsonable(row: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.isoformat() if hasattr(value, "isoformat") else value
        for name, value in row.items()
    }


def _print_table(rows: list[dict[str, Any]], columns: tuple[str, ...], as_json: bool) -> None:
    if as_json:
        common.print_json([_jsonable(row) for row in rows])
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, box=None)
    for row in rows:
        table.add_row(*(_cell(row[name]) for name in columns))
    Console().print(table, markup=False)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:%Y-%m-%d %H:%M}" if hasattr(value, "strftime") else str(value)
