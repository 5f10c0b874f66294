"""What full KV blocks are called: a chain of keyed hashes over the tokens that they hold.

A block's name stands for its tokens and all before them. The key is the tenant's own, so that a
tenant's requests find what its requests computed and nothing else: how fast an answer comes tells
nobody what another has sent.
"""

from __future__ import annotations

import secrets
from array import array
from hashlib import blake2b

from select_n_core.kv.named import FIRST

_BYTES = 32


class Salts:
    """A key for every tenant, made from a secret that is drawn here and never handed out."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(_BYTES)

    def of(self, tenant: str) -> blake2b:
        """A hash under the tenant's key, to be copied; tenants without a name share one."""
        name = tenant.encode("utf-8", "surrogatepass")
        key = blake2b(name, key=self._secret, digest_size=_BYTES).digest()
        return blake2b(key=key, digest_size=_BYTES)


def extend(
    names: list[bytes], tokens: array[int], block_tokens: int, count: int, salt: blake2b
) -> None:
    """Name the blocks of a sequence up to the `count`-th, all full.

    Args:
        names: of its first blocks, to which the missing ones are added.
        salt: of the tenant; see `Salts.of`.
    """
    before = names[-1] if names else FIRST
    for begin in range(len(names) * block_tokens, count * block_tokens, block_tokens):
        name = salt.copy()
        name.update(before)
        name.update(tokens[begin : begin + block_tokens])
        before = name.digest()
        names.append(before)
