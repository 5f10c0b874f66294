"""The deployments' names: stable, readable, unique, and safe for Ray."""

from __future__ import annotations

import hashlib
import re

INGRESS = "ingress"


def deployment_name(model: str) -> str:
    """`org/model:v1` as `model-org-model-v1-3f2a9c01`; a plain name keeps its spelling."""
    slug = re.sub(r"[^A-Za-z0-9_.-]+", "-", model)
    if slug == model:
        return f"model-{model}"
    return f"model-{slug}-{hashlib.sha256(model.encode()).hexdigest()[:8]}"
