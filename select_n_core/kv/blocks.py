"""Who owns which KV block: a table per request, blocks conserved."""

from __future__ import annotations

from select_n_core.errors import DeviceMemoryError


class BlockTable:
    """Blocks of every request. Ids are handed out from the top of the lattice, densely.

    Args:
        blocks: ids 0 .. blocks - 1 exist.
        block_tokens: tokens in a block.
    """

    def __init__(self, blocks: int, block_tokens: int) -> None:
        self.blocks = blocks
        self.block_tokens = block_tokens
        self._free = list(range(blocks))  # popped from the end: highest ids first
        self._owned: dict[str, list[int]] = {}

    @property
    def free_blocks(self) -> int:
        """Blocks nobody owns."""
        return len(self._free)

    @property
    def free_tokens(self) -> int:
        """Tokens that fit into them."""
        return self.free_blocks * self.block_tokens

    def blocks_of(self, tokens: int) -> int:
        """Blocks that `tokens` tokens of one request take."""
        return -(-tokens // self.block_tokens)

    def reserve(self, request_id: str, tokens: int) -> None:
        """Give a new request room for `tokens` tokens.

        Raises:
            DeviceMemoryError: not enough free blocks; nothing was taken.
        """
        need = self.blocks_of(tokens)
        if need > len(self._free):
            raise DeviceMemoryError(
                f"request {request_id} needs {need} KV blocks, {len(self._free)} are free"
            )
        if request_id in self._owned:
            raise DeviceMemoryError(f"request {request_id} owns KV blocks already")
        self._owned[request_id] = [self._free.pop() for _ in range(need)]

    def table(self, request_id: str) -> list[int]:
        """The request's blocks in token order."""
        return self._owned[request_id]

    def release(self, request_id: str) -> None:
        """Take a request's blocks back."""
        self._free += reversed(self._owned.pop(request_id))
