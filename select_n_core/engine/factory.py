"""Which client a model's configuration asks for."""

from __future__ import annotations

from select_n_core.config import ModelConfig
from select_n_core.engine.client import EngineClient, InlineClient, ProcessClient


def create_client(model: ModelConfig) -> EngineClient:
    """The client of `model.engine`, not started yet."""
    return ProcessClient(model) if model.engine == "process" else InlineClient(model)
