"""The command `vllm-int8kv store`: what is in a folder of the KV store."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import track
from rich.table import Table

from vllm_int8kv.commands.terminal import console, error_console, fail
from vllm_int8kv.store import files, index
from vllm_int8kv.store.namespace import read_description

app = typer.Typer(help="Look into a folder of the KV store, check it, or make room in it.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(help="The folder of the store.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@dataclass
class Namespace:
    """The blocks that engines of one kind share."""

    name: str
    model: str
    codec: str
    formats: str
    block_size: int
    rank: str
    num_files: int = 0
    num_bytes: int = 0
    last_used: float = 0.0
    """seconds since the epoch"""
    unfinished: list[str] = field(default_factory=list)
    """names of files that are being written, or were when their writer was killed"""


def _namespaces(path: Path) -> list[Namespace]:
    if not path.is_dir():
        raise fail(f"{path} is no folder")
    found: dict[str, Namespace] = {}
    for file in index.stored_files(path):
        name = file.path.relative_to(path).parts[0]
        if name not in found:
            found[name] = Namespace(name, **read_description(path / name))
        own = found[name]
        if file.path.name.endswith(files.TEMPORARY_SUFFIX):
            own.unfinished.append(file.path.name)
        else:
            own.num_files += 1
            own.num_bytes += file.num_bytes
            own.last_used = max(own.last_used, file.used)
    return sorted(found.values(), key=lambda own: -own.last_used)


@app.command("ls")
def list_namespaces(path: Folder, as_json: AsJson = False) -> None:
    """What engines have stored: one line for each model, format, codec and rank."""
    found = _namespaces(path)
    if as_json:
        typer.echo(json.dumps([vars(own) for own in found], indent=2))
        return
    table = Table("namespace", "model", "codec", "cache", "rank", title=str(path))
    for column in ("block size", "blocks", "MB", "last used"):
        table.add_column(column, justify="right")
    for own in found:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(own.last_used))
        sizes = str(own.block_size), f"{own.num_files:,}", f"{own.num_bytes / 1e6:,.1f}"
        table.add_row(own.name[:12], own.model, own.codec, own.formats, own.rank, *sizes, used)
    console.print(table)


@app.command()
def stat(path: Folder, as_json: AsJson = False) -> None:
    """How much is stored in all."""
    found = _namespaces(path)
    total = {
        "namespaces": len(found),
        "blocks": sum(own.num_files for own in found),
        "tokens": sum(own.num_files * own.block_size for own in found),
        "bytes": sum(own.num_bytes for own in found),
        "unfinished": sum(len(own.unfinished) for own in found),
    }
    if as_json:
        typer.echo(json.dumps(total, indent=2))
        return
    for name, value in total.items():
        console.print(f"{name}: {value:,}")


@app.command()
def verify(
    path: Folder, remove: Annotated[bool, typer.Option("--remove", help="Remove the files that are bad.")] = False
) -> None:
    """Read every file and compare its checksum. Exit code 1 if one is bad."""
    _namespaces(path)
    checked = bad = 0
    found = [file for file in index.stored_files(path) if file.path.name.endswith(files.SUFFIX)]
    for file in track(found, "Checking", console=error_console, transient=True):
        checked += 1
        try:
            header, _ = files.read(file.path)
            if files.path_of(path, header.namespace, header.block) != file.path:
                raise files.BadFile("it is the file of another block")
        except files.BadFile as error:
            bad += 1
            console.print(f"{file.path}: {error}", soft_wrap=True, markup=False)
            if remove:
                file.path.unlink(missing_ok=True)
    console.print(f"{checked:,} files, {bad:,} bad" + (", removed" if remove and bad else ""))
    raise typer.Exit(1 if bad else 0)


@app.command()
def gc(
    path: Folder,
    max_bytes: Annotated[int, typer.Option(min=0, help="What may be left; the blocks used longest ago go first.")],
) -> None:
    """Make room: remove the blocks that were used longest ago, and what killed writers left."""
    before = sum(own.num_bytes for own in _namespaces(path))
    removed, left = index.collect(path, max_bytes)
    console.print(f"{removed:,} files removed, {left:,} of {before:,} bytes left")
