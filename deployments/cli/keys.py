"""`select-n key`: a new API key, which is shown once and stored nowhere."""

from __future__ import annotations

import yaml
from pydantic import TypeAdapter, ValidationError

from deployments.tenants.keys import hash_of, new_key
from select_n_core.errors import InputError
from select_n_core.live import Name

_name: TypeAdapter[str] = TypeAdapter(Name)


def make_key(tenant: str) -> dict[str, str]:
    """A key of `tenant`, and the line that the keys_file needs to let it in.

    Raises:
        InputError: no tenant can have that name.
    """
    try:
        _name.validate_python(tenant)
    except ValidationError as error:
        raise InputError(
            f"tenant: {tenant!r} is no tenant's name: letters, digits, '.', '_' and '-', at most "
            "64 of them",
            field="tenant",
        ) from error
    key = new_key()
    line = yaml.safe_dump({hash_of(key): tenant}, width=1000).strip()  # quotes a name like `yes`
    return {"tenant": tenant, "key": key, "line": line}
