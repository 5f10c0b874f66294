"""What every command keeps to: one JSON object or lines on stdout, the rest on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from rich import progress
from rich.console import Console

from select_n_core.errors import InfeasibleError, InputError, LinkError, SelectNError

if TYPE_CHECKING:
    from select_n_core.profiling.measure import Progress  # its module brings torch

BAD_INPUT = 2
FAILED = 1


def emit(document: dict[str, Any], lines: list[str], *, as_json: bool) -> None:
    """Print `document` as JSON, or `lines` for people."""
    typer.echo(json.dumps(document) if as_json else "\n".join(lines))


def fail(message: str, code: int) -> NoReturn:
    """Print one line to stderr and exit."""
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    raise SystemExit(code)


def run(app: Callable[..., Any]) -> None:
    """Run a typer app; every error raised on purpose becomes one line and an exit code."""
    try:
        code = app(standalone_mode=False)
    except typer.TyperException as error:
        fail(error.format_message(), BAD_INPUT)
    except typer.Abort:
        fail("interrupted", 130)
    except (InputError, InfeasibleError, LinkError) as error:
        fail(str(error), BAD_INPUT)
    except SelectNError as error:
        fail(str(error), FAILED)
    sys.exit(code if isinstance(code, int) else 0)


@contextmanager
def progress_bar(label: str) -> Iterator[Progress]:
    """A progress bar on stderr that takes (what is done now, share done)."""
    bar = progress.Progress(
        progress.TextColumn("{task.fields[label]}", markup=False),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.description}", markup=False),
        console=Console(stderr=True),
    )
    with bar:
        task = bar.add_task("", total=1.0, label=label)
        yield lambda what, share: bar.update(task, completed=share, description=what)
