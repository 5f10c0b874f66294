"""From what a user writes as `source` to a local directory that can be loaded.

Three kinds: `demo:NAME`, a local Hugging Face directory, and a hub id. Only safetensors are
accepted, because pickled weights are programs; code that comes with a model is never run.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from select_n_core.errors import ModelNotFoundError, UnsupportedModelError
from select_n_core.models import demo

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

_HUB_TEXT = ("*.json", "*.jinja", "tokenizer*", "*.model", "*.txt")
_HUB_WEIGHTS = ("*.safetensors",)
# Folders hold other formats of the same weights, and so does `consolidated*`.
_HUB_IGNORE = ["*/*", "consolidated*", *_PICKLES, "*.py"]


def resolve(source: str) -> Path:
    """The local directory of a model: config, safetensors and tokenizer, downloaded if need be.

    `source` is `demo:NAME`, an existing directory, or a hub id (`owner/name`); the hub's own
    variables (`HF_HUB_OFFLINE`, `HF_HOME`, `HF_TOKEN`) apply. Raises `ModelNotFoundError` when
    there is no such model and `UnsupportedModelError` when it cannot be loaded safely.
    """
    if source.startswith(demo.SCHEME):
        return demo.materialise(source.removeprefix(demo.SCHEME))
    directory = _find(source, _HUB_TEXT + _HUB_WEIGHTS)
    _check(source, directory)
    return directory


def resolve_text(source: str) -> Path:
    """The local directory of a model's tokenizer: all that one with paced compute needs of it.

    As `resolve`, but weights are neither asked for nor downloaded.
    """
    if source.startswith(demo.SCHEME):
        return demo.materialise(source.removeprefix(demo.SCHEME))
    return _find(source, _HUB_TEXT)


def _find(source: str, files: tuple[str, ...]) -> Path:
    """The directory that `source` names: a local one, or the hub's with `files` of it."""
    path = os.path.expanduser(source)  # like isdir and exists, it never raises
    if os.path.isdir(path):
        return Path(path).resolve()
    if os.path.exists(path):
        raise ModelNotFoundError(
            f"source: {source} is a file; name the directory that holds its config.json",
            field="source",
        )
    if _is_path(source):
        raise ModelNotFoundError(
            f"source: no directory {source}; "
            "name an existing one, a hub id (owner/name) or demo:NAME",
            field="source",
        )
    return _download(source, files)


def read_model_config(directory: Path) -> dict[str, Any]:
    """The content of a directory's config.json; `UnsupportedModelError` if there is none."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UnsupportedModelError(
            f"source: {directory} has no config.json, so it is not a Hugging Face model directory",
            field="source",
        ) from error
    except ValueError as error:
        raise UnsupportedModelError(
            f"source: {path} is not valid JSON: {error}", field="source"
        ) from error
    if not isinstance(config, dict):
        raise UnsupportedModelError(f"source: {path} is not a JSON object", field="source")
    return config


def model_config_hash(directory: Path) -> str:
    """SHA-256 (hex) of what config.json says about the model.

    Neither the order of keys nor those that only tell who wrote the file change it.
    """
    config = _without_authorship(read_model_config(directory))
    canonical = json.dumps(config, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _without_authorship(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _without_authorship(each)
            for key, each in value.items()
            if key != "transformers_version" and not key.startswith("_")
        }
    if isinstance(value, list):
        return [_without_authorship(each) for each in value]
    return value


def _is_path(source: str) -> bool:
    return source.startswith((".", "~")) or source.count("/") > 1 or Path(source).is_absolute()


def _download(hub_id: str, files: tuple[str, ...]) -> Path:
    """The snapshot of a hub model, from the local cache where that is complete."""
    # The hub's client takes a third of a second to import; most sources do not need it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(
            snapshot_download(hub_id, allow_patterns=list(files), ignore_patterns=_HUB_IGNORE)
        )
    except HFValidationError as error:
        problem = "is neither a directory, a hub id (owner/name) nor demo:NAME"
        raise _not_found(hub_id, problem) from error
    except GatedRepoError as error:
        problem = "is gated; accept its terms on the hub and set HF_TOKEN"
        raise _not_found(hub_id, problem) from error
    except RepositoryNotFoundError as error:
        problem = "is not on the hub; check the spelling, or set HF_TOKEN if it is private"
        raise _not_found(hub_id, problem) from error
    except LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if _is_offline() else "the hub cannot be reached"
        problem = (
            f"is not a directory and not (wholly) in the local hub cache, and {why}; "
            f"run `hf download {hub_id}` where the hub can be reached, or name a local directory"
        )
        raise _not_found(hub_id, problem) from error
    except Exception as error:  # the errors of whichever HTTP library the hub's client uses
        problem = f"could not be downloaded; try again ({_first_line(error)})"
        raise _not_found(hub_id, problem) from error


def _not_found(hub_id: str, problem: str) -> ModelNotFoundError:
    return ModelNotFoundError(f"source: '{hub_id}' {problem}", field="source")


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _check(source: str, directory: Path) -> None:
    """Refuse what could only be loaded by running code from the model, or not at all."""
    config = read_model_config(directory)
    if config.get("auto_map") and not _is_known(config.get("model_type")):
        raise UnsupportedModelError(
            f"source: {source} brings its own code for model_type {config.get('model_type')!r}, "
            "which is never run; use a model that the installed transformers knows",
            field="source",
        )
    if (directory / _INDEX).is_file():
        missing = [name for name in _shards(directory / _INDEX) if not (directory / name).is_file()]
        if missing:
            raise UnsupportedModelError(
                f"source: {source} lacks {len(missing)} of its weight files, the first is "
                f"{missing[0]}; download the model again",
                field="source",
            )
    elif not (directory / _WEIGHTS).is_file():
        pickles = sorted(path.name for glob in _PICKLES for path in directory.glob(glob))
        found = f"only pickled weights ({pickles[0]})" if pickles else f"no {_WEIGHTS}"
        raise UnsupportedModelError(
            f"source: {source} has {found}; safetensors only, so use a safetensors version of it",
            field="source",
        )


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnsupportedModelError(
            f"source: {index} is not an index of safetensors; download the model again",
            field="source",
        ) from error


def _is_known(model_type: object) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return isinstance(model_type, str) and model_type in CONFIG_MAPPING
