"""The user's cache folder: things that are made once and may be deleted at any time."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from select_n_core.errors import ConfigError

CACHE_VARIABLE = "SELECT_N_CACHE"


def cache_directory(room: str) -> Path:
    """The folder for one kind of thing (`models`, `records`), created if it is missing.

    It lies under the user's cache folder, or under `SELECT_N_CACHE` where that is set; a folder
    that cannot be made is a `ConfigError`.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    root = Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("select-n")
    directory = root.absolute() / room
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot make the cache folder {directory}: {error.strerror}; "
            f"set {CACHE_VARIABLE} to a folder you can write",
            field=CACHE_VARIABLE,
        ) from error
    return directory
