"""What the cluster benchmark has measured so far: one file per part, used again while it holds.

A part holds for the very setup it was measured with and the product's source. Whatever was void is
measured again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT, note
from benchmarks.slo_cache import digest_of

_SOURCE = ("select_n_core/**/*.py", "deployments/**/*.py", "autoscaler/**/*.py")


class Store:
    """The folder of parts.

    Args:
        again: measure nothing, use what is there.
    """

    def __init__(self, directory: Path, *, again: bool = False) -> None:
        self.directory = directory
        self._again = again
        self._source = source_digest()
        directory.mkdir(parents=True, exist_ok=True)

    @property
    def measures(self) -> bool:
        """Whether anything may be measured."""
        return not self._again

    def load(self, name: str, setup: dict[str, Any]) -> dict[str, Any] | None:
        """The part of this name and setup, if it is there and counts."""
        path = self._path(name, setup)
        if not path.exists():
            return None
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return None if found.get("void") and self.measures else found

    def save(self, name: str, setup: dict[str, Any], measured: dict[str, Any]) -> None:
        """Keep a part, whole or not at all."""
        path = self._path(name, setup)
        written = path.with_suffix(".part")
        written.write_text(json.dumps(measured), encoding="utf-8")
        written.replace(path)

    def part(
        self, name: str, setup: dict[str, Any], measure: Callable[[], dict[str, Any]]
    ) -> dict[str, Any] | None:
        """The part of this name and setup, measured if it is not there; None if it may not be.

        Args:
            setup: plain values that it depends on, beside the source.
            measure: gives plain values; under `void` it says why they count for nothing, if so.
        """
        found = self.load(name, setup)
        if found is None and self.measures:
            note(f"{name} ...")
            measured = measure()
            self.save(name, setup, measured)
            # As it will be read: keys are strings, tuples are lists.
            plain: dict[str, Any] = json.loads(json.dumps(measured))
            return plain
        return found

    def _path(self, name: str, setup: dict[str, Any]) -> Path:
        digest = digest_of({"name": name, "source": self._source, **setup})
        return self.directory / f"{name}-{digest}.json"


def source_digest(root: Path = ROOT) -> str:
    """Names the product's source, committed or not."""
    found = hashlib.sha256()
    for path in sorted(path for pattern in _SOURCE for path in root.glob(pattern)):
        found.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]
