"""API keys: made here, kept as hashes only, read from a file that may change while serving.

A key is 256 random bits, so a plain SHA-256 hides it: there are too many to try, and a slow hash
would only slow every request down. A key is looked up by its hash, hashed once more with a secret
of this process: how long a comparison takes then depends on bits that nobody outside can choose or
learn from, however many keys there are.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
from pathlib import Path

import yaml

from select_n_core.errors import ConfigError, UnavailableError

_log = logging.getLogger(__name__)

# The parser in C, where PyYAML has it: requests wait while the file is read.
_LOADER: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_HASH = re.compile(r"sha256:[0-9a-f]{64}")

Stamp = tuple[str, int, int, int]


def new_key() -> str:
    """A key that nobody has had before."""
    return f"sk-{secrets.token_urlsafe(32)}"


def hash_of(key: str) -> str:
    """What the file holds of a key: `sha256:` and 64 hexadecimal digits."""
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"


def read_keys(path: str) -> dict[str, str]:
    """Hash -> tenant, as the file at `path` says: one line `sha256:...: tenant` for every key.

    Raises:
        ConfigError: it cannot be read, is no such mapping, or holds something that is no hash.
    """
    try:
        keys = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_LOADER)
    except OSError as error:
        raise ConfigError(f"keys_file: cannot read {path}: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        # The parser's own words would quote the file.
        raise ConfigError(f"keys_file: {path} is not valid YAML") from error
    if not isinstance(keys, dict):  # a file that is being written is empty first
        raise ConfigError(f"keys_file: {path} must map hashes of keys to tenants")
    for number, (digest, tenant) in enumerate(keys.items(), start=1):
        if not isinstance(digest, str) or not _HASH.fullmatch(digest):
            # It may be a key that somebody forgot to hash: it is not repeated.
            raise ConfigError(
                f"keys_file: entry {number} of {path} is no hash (sha256: and 64 hexadecimal "
                "digits); `select-n key TENANT` makes a key and its line"
            )
        if not isinstance(tenant, str):
            raise ConfigError(f"keys_file: entry {number} of {path} names no tenant")
    return keys


class KeyFile:
    """The keys of a file, read again when it changes.

    A new file that is broken changes nothing: the keys read last stay, and the log says so.
    """

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)
        self._stamp: Stamp | None = None
        self._tenants: dict[bytes, str] | None = None

    def tenant_of(self, key: str, path: str) -> str | None:
        """The name that the file at `path` gives to whoever holds `key`; None for a strange one.

        Raises:
            UnavailableError: no such file could be read so far.
        """
        self._refresh(path)
        if self._tenants is None:
            raise UnavailableError("API keys cannot be checked now; send the request again")
        return self._tenants.get(self._blinded(hash_of(key)))

    def _refresh(self, path: str) -> None:
        stamp = _stamp(path)
        if stamp == self._stamp:
            return
        self._stamp = stamp  # before reading: a broken file is complained of once
        try:
            keys = read_keys(path)
        except ConfigError as error:
            kept = "nobody is let in" if self._tenants is None else "the keys before it stay"
            _log.error("%s; %s", error, kept)
            return
        self._tenants = {self._blinded(digest): tenant for digest, tenant in keys.items()}
        _log.info("read %d API keys from %s", len(keys), path)

    def _blinded(self, digest: str) -> bytes:
        return hmac.digest(self._secret, digest.encode(), "sha256")


def _stamp(path: str) -> Stamp:
    """What differs once the file does; a mounted secret is replaced by turning a link."""
    try:
        found = os.stat(path)
    except OSError:
        return path, 0, 0, 0
    return path, found.st_mtime_ns, found.st_size, found.st_ino
