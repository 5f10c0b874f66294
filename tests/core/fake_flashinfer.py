"""FlashInfer's two paged wrappers as their documentation describes them, in plain torch.

Only what the product uses, and strict: int32 host tensors to plan, keys and values of one stride,
no plan between the begin of a graph and its end, the batch size of a graph fixed.
"""

from typing import Any

import torch
from torch import Tensor


class _Wrapper:
    def __init__(self, workspace: Tensor, kv_layout: str) -> None:
        assert kv_layout == "HND"
        assert workspace.dtype == torch.uint8
        assert not workspace.any(), "the workspace must be zero at first"

    def _remember(self, indptr: Tensor, indices: Tensor, last: Tensor, **facts: Any) -> None:
        for tensor in (indptr, indices, last):
            assert tensor.dtype == torch.int32
            assert tensor.device.type == "cpu"
        assert indptr[-1] == len(indices)
        assert (last >= 1).all()
        assert (last <= facts["page_size"]).all()
        self.indptr, self.indices, self.last, self.facts = indptr, indices, last, facts

    def _attend(self, q: Tensor, cache: tuple[Tensor, Tensor], new: list[int]) -> Tensor:
        keys, values = cache
        facts = self.facts
        assert keys.stride() == values.stride(), "K and V strides differ"
        assert q.stride(-1) == 1
        assert q.shape[1:] == (facts["num_qo_heads"], facts["head_dim"])
        assert keys.shape[1:3] == (facts["num_kv_heads"], facts["page_size"])
        assert q.dtype == facts["q_data_type"]
        assert keys.dtype == facts["kv_data_type"]
        group = facts["num_qo_heads"] // facts["num_kv_heads"]
        out, start = [], 0
        for row, count in enumerate(new):
            pages = self.indices[self.indptr[row] : self.indptr[row + 1]].long()
            length = (len(pages) - 1) * facts["page_size"] + int(self.last[row])
            k, v = (
                each[pages].transpose(0, 1).reshape(each.shape[1], -1, each.shape[3])[:, :length]
                for each in (keys, values)
            )
            k, v = (each.repeat_interleave(group, dim=0).float() for each in (k, v))
            own = q[start : start + count].transpose(0, 1).float()
            scores = own @ k.mT * facts["sm_scale"]
            if facts["logits_soft_cap"]:
                scores = facts["logits_soft_cap"] * torch.tanh(scores / facts["logits_soft_cap"])
            seen = torch.arange(length)
            at = torch.arange(length - count, length)[:, None]
            hidden = seen > at
            if facts["window_left"] >= 0:
                hidden |= seen < at - facts["window_left"]
            weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1)
            out.append((weights @ v).transpose(0, 1).to(q.dtype))
            start += count
        assert start == len(q)
        return torch.cat(out)


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    def __init__(
        self,
        workspace: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: Tensor | None = None,
        paged_kv_indices_buffer: Tensor | None = None,
        paged_kv_last_page_len_buffer: Tensor | None = None,
    ) -> None:
        super().__init__(workspace, kv_layout)
        self._buffers: tuple[Tensor, Tensor, Tensor] | None = None
        if use_cuda_graph:
            assert paged_kv_indptr_buffer is not None
            assert paged_kv_indices_buffer is not None
            assert paged_kv_last_page_len_buffer is not None
            assert len(paged_kv_indptr_buffer) == len(paged_kv_last_page_len_buffer) + 1
            self._buffers = (
                paged_kv_indptr_buffer,
                paged_kv_indices_buffer,
                paged_kv_last_page_len_buffer,
            )

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
        sm_scale: float | None = None,
    ) -> None:
        facts = {name: value for name, value in locals().items() if name not in _NOT_FACTS}
        if self._buffers is not None:
            assert len(last_page_len) == len(self._buffers[2]), "the batch size is fixed"
            assert len(indices) <= len(self._buffers[1])
            for buffer, tensor in zip(self._buffers, (indptr, indices, last_page_len), strict=True):
                buffer[: len(tensor)].copy_(tensor)
        self._remember(indptr, indices, last_page_len, **facts)

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor:
        return self._attend(q, paged_kv_cache, [1] * len(self.last))


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    def __init__(self, workspace: Tensor, kv_layout: str = "NHD") -> None:
        super().__init__(workspace, kv_layout)

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool = False,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
        sm_scale: float | None = None,
    ) -> None:
        assert causal
        facts = {name: value for name, value in locals().items() if name not in _NOT_FACTS}
        facts["head_dim"] = head_dim_qk
        self._new = qo_indptr.diff().tolist()
        self._remember(paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, **facts)

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor:
        return self._attend(q, paged_kv_cache, self._new)


_NOT_FACTS = {
    "self",
    "__class__",
    "indptr",
    "indices",
    "last_page_len",
    "qo_indptr",
    "paged_kv_indptr",
    "paged_kv_indices",
    "paged_kv_last_page_len",
    "head_dim_qk",
    "causal",
}
