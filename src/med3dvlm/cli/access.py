"""`users`, `keys` and `audit`: accounts of the service, and its log, from its own machine."""

from __future__ import annotations

import getpass
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from med3dvlm.cli import common
from med3dvlm.cli.common import JsonOption, grouped
from med3dvlm.cli.service import ServiceOptions, local_person

users_app = typer.Typer(no_args_is_help=True, help="The service's accounts.")
keys_app = typer.Typer(no_args_is_help=True, help="The service's API keys.")
audit_app = typer.Typer(no_args_is_help=True, help="The service's audit log.")

NameArgument = Annotated[str, typer.Argument(help="Name of the account.")]
RoleOption = Annotated[
    str, typer.Option(help="reader, reviewer, administrator or service.", show_default=False)
]


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
@grouped
def add_user(
    name: NameArgument,
    role: RoleOption,
    display_name: Annotated[str, typer.Option(help="As signatures show it.")] = "",
    *,
    where: ServiceOptions,
) -> None:
    """Make an account; the password is asked for, or is the first line of standard input.

    Example: `med3dvlm users add ann --role reviewer --display-name "Dr. Ann Miller"`
    """
    from med3dvlm.service.access import users

    with where.opened_database() as (settings, opened):
        user = users.add_user(
            opened,
            local_person(),
            name,
            role=role,
            password=_ask_password(),
            display_name=display_name,
            password_length=settings.password_length,
        )
    typer.echo(f"{user.name}: {user.role}")


@users_app.command("list")
@grouped
def list_users(
    as_json: JsonOption = False,
    *,
    where: ServiceOptions,
) -> None:
    """List the accounts.

    Example: `med3dvlm users list`
    """
    from med3dvlm.service.access import users

    with where.opened_database() as (_, opened), opened.reading() as session:
        rows = [users.public(user) for user in users.list_users(session)]
    columns = ("name", "display_name", "role", "sign_in", "created", "disabled")
    _print_table(rows, columns, as_json)


@users_app.command("role")
@grouped
def change_role(
    name: NameArgument,
    role: Annotated[str, typer.Argument(help="reader, reviewer, administrator or service.")],
    *,
    where: ServiceOptions,
) -> None:
    """Give an account another role; it must sign in again.

    Example: `med3dvlm users role ann reader`
    """
    from med3dvlm.service.access import users

    with where.opened_database() as (_, opened):
        user = users.change_user(opened, local_person(), name, role=role)
    typer.echo(f"{user.name}: {user.role}")


@users_app.command("disable")
@grouped
def disable_user(
    name: NameArgument,
    undo: Annotated[bool, typer.Option("--undo", help="Let it in again.")] = False,
    *,
    where: ServiceOptions,
) -> None:
    """Shut an account out at once. Its name stays taken, since signatures and the log name it.

    Example: `med3dvlm users disable ann`
    """
    from med3dvlm.service.access import keys, users

    with where.opened_database() as (_, opened):
        user = users.change_user(opened, local_person(), name, disabled=not undo)
        with opened.reading() as session:
            left = [key.name for key in keys.list_keys(session) if key.created_by == user.name
                    and key.revoked is None]  # fmt: skip
    typer.echo(f"{user.name}: {'let in again' if undo else 'disabled'}")
    if left and not undo:
        common.errors.print(f"note: API keys that {user.name} made still work: {', '.join(left)}")


@users_app.command("password")
@grouped
def change_password(
    name: NameArgument,
    *,
    where: ServiceOptions,
) -> None:
    """Give an account another password, asked for or the first line of standard input.

    Example: `med3dvlm users password ann`
    """
    from med3dvlm.service.access import users

    with where.opened_database() as (settings, opened):
        password = _ask_password()
        length = settings.password_length
        users.set_password(opened, local_person(), name, password, password_length=length)
    typer.echo(f"{name}: password changed, signed out everywhere")


# --- keys -----------------------------------------------------------------------------------


@keys_app.command("add")
@grouped
def add_key(
    name: Annotated[str, typer.Argument(help="What the key is for.")],
    role: RoleOption,
    days: Annotated[float, typer.Option(help="Until it ends; at most 366.")] = 90,
    as_json: JsonOption = False,
    *,
    where: ServiceOptions,
) -> None:
    """Make a key and print it, this one time.

    Example: `med3dvlm keys add pacs-router --role service --days 180`
    """
    from med3dvlm.service.access import keys

    with where.opened_database() as (_, opened):
        key, token = keys.add_key(opened, local_person(), name, role=role, days=days)
    if as_json:
        common.print_json(_jsonable({**keys.public(key), "key": token}))
        return
    typer.echo(token)
    common.errors.print(
        f"Key {key.name}, {key.role}, until {key.expires:%Y-%m-%d}. Keep it: it is not shown again."
    )


@keys_app.command("list")
@grouped
def list_keys(
    as_json: JsonOption = False,
    *,
    where: ServiceOptions,
) -> None:
    """List the keys, without the keys themselves.

    Example: `med3dvlm keys list`
    """
    from med3dvlm.service.access import keys

    with where.opened_database() as (_, opened), opened.reading() as session:
        rows = [keys.public(key) for key in keys.list_keys(session)]
    columns = ("name", "role", "hint", "created_by", "expires", "used", "revoked")
    _print_table(rows, columns, as_json)


@keys_app.command("revoke")
@grouped
def revoke_key(
    key: Annotated[str, typer.Argument(help="Its name or id.")],
    *,
    where: ServiceOptions,
) -> None:
    """End a key at once.

    Example: `med3dvlm keys revoke pacs-router`
    """
    from med3dvlm.service.access import keys

    with where.opened_database() as (_, opened):
        found = keys.revoke_key(opened, local_person(), key)
    typer.echo(f"{found.name}: revoked")


# --- audit ----------------------------------------------------------------------------------


@audit_app.command("verify")
@grouped
def verify(
    expected: Annotated[
        str | None,
        typer.Option(help="ROW:HASH that an earlier verify printed; notices a cut-off end."),
    ] = None,
    as_json: JsonOption = False,
    *,
    where: ServiceOptions,
) -> None:
    """Go through the log's chain of hashes; names the first row that is not as it was written.

    Example: `med3dvlm audit verify`
    """
    from dataclasses import asdict

    from med3dvlm.service import audit

    noted = _row_and_hash(expected) if expected else None
    with where.opened_database() as (_, opened), opened.reading() as session:
        verdict = audit.verify(session, expected=noted)
    if as_json:
        common.print_json({"sound": verdict.sound, **asdict(verdict)})
    elif verdict.sound:
        typer.echo(f"{verdict.rows} rows, all sound; note this: {verdict.rows}:{verdict.hash}")
    else:
        common.fail(ValueError(f"the log is not sound. {verdict.reason}"))
    if not verdict.sound:
        raise typer.Exit(1)


def _row_and_hash(text: str) -> tuple[int, str]:
    row, _, hash = text.partition(":")
    if not row.isdecimal() or len(hash) != 64:
        raise typer.BadParameter(f"--expected {text!r} is not ROW:HASH, as verify prints it.")
    return int(row), hash


@audit_app.command("export")
@grouped
def export(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSONL file; standard output without.")
    ] = None,
    after: Annotated[int, typer.Option(min=0, help="Only rows after this one.")] = 0,
    *,
    where: ServiceOptions,
) -> None:
    """Write the log as JSON lines, one a row, with the hashes. The export itself is noted in it.

    Example: `med3dvlm audit export -o audit.jsonl`
    """
    from med3dvlm.files import atomic_file
    from med3dvlm.service import audit

    with where.opened_database() as (_, opened):
        with opened.session() as session:
            audit.record(session, local_person(), "audit.export", "audit", after=after)
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
