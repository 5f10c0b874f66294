"""What every command keeps to: one JSON object or lines on stdout, the rest on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import typer

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
    shown: Any = typer.progressbar(
        length=1000, label=label, file=sys.stderr, item_show_func=lambda what: str(what or "")
    )
    with shown as bar:

        def report(what: str, share: float) -> None:
            bar.current_item = what
            bar.update(round(share * 1000) - bar.pos)

        yield report
