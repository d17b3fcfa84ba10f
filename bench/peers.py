"""Other implementations of a decode step, where they are installed, on the same queries, keys and values.

AdaSplash's attention kernels need as many queries as keys, so they cannot decode. Dense entmax in Triton is therefore
its `triton_entmax` between two matrix products, one for the scores and one for the values.
"""

from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.inputs import Inputs
from entmaxkv import PagedKVCache

sdpa = torch.nn.functional.scaled_dot_product_attention
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,  # slow, but runs on every input
}
WORKSPACE = 128 << 20  # bytes of FlashInfer's workspace


class Peer(NamedTuple):
    """A step that returns [batch, heads, head_dim] or [batch, heads, 1, head_dim], and the alpha of its attention."""

    call: Callable[[], Tensor]
    alpha: float = 1.0


def why(error: Exception) -> str:
    """The first line of an error."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


@cache
def compiled_flex_attention() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = 64  # one per shape; above this limit it would run uncompiled
    return torch.compile(flex_attention)


def flashinfer(inputs: Inputs, paged: PagedKVCache) -> Callable[[], Tensor]:
    """FlashInfer's batch decode, on the pages of our cache."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    q, k, _ = inputs
    batch, context = k.shape[:2]
    pages = -(-context // paged.page_size)
    workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=q.device)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=q.shape[1] > paged.kv_heads)
    wrapper.plan(
        torch.arange(0, batch * pages + 1, pages, dtype=torch.int32, device=q.device),
        paged.page_table[:, :pages].flatten(),
        torch.full((batch,), context - (pages - 1) * paged.page_size, dtype=torch.int32, device=q.device),
        q.shape[1],
        paged.kv_heads,
        paged.head_dim,
        paged.page_size,
        q_data_type=q.dtype,
        kv_data_type=k.dtype,
    )
    return lambda: wrapper.run(q, (paged.k_pages, paged.v_pages))


def adasplash(q_rows: Tensor, k_rows: Tensor, v_rows: Tensor, alpha: float) -> Callable[[], Tensor]:
    """Dense entmax by two batched matrix products and AdaSplash's `triton_entmax`, with scores in float32."""
    from adasplash import triton_entmax

    q, k, v = (x.flatten(0, 1) for x in (q_rows, k_rows, v_rows))
    scale = q.shape[2] ** -0.5

    def call() -> Tensor:
        scores = torch.bmm(q, k.transpose(1, 2), out_dtype=torch.float32).mul_(scale)
        return torch.bmm(triton_entmax(scores, alpha=alpha).to(v.dtype), v).view(len(q_rows), -1, q.shape[2])

    return call


def peers(
    inputs: Inputs, paged: PagedKVCache, alpha: float, notes: dict[str, str], *, only_sdpa: bool = False
) -> dict[str, Peer]:
    """The implementations that run here, by name; adds to `notes` why the others do not."""
    q, k, v = inputs
    k_rows, v_rows = (x.transpose(1, 2).contiguous() for x in (k, v))
    q_rows = q.view(len(q), k.shape[2], -1, q.shape[2])  # the heads of a group are queries of their KV head
    if q.device.type == "cpu":  # faster on the CPU than enable_gqa=True
        return {"softmax SDPA": Peer(lambda: sdpa(q_rows, k_rows, v_rows).flatten(1, 2))}

    def by(backend: SDPBackend) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with sdpa_kernel(backend):
                return sdpa(q[:, :, None], k_rows, v_rows, enable_gqa=True)

        return call

    def flex() -> Tensor:
        return compiled_flex_attention()(q[:, :, None], k_rows, v_rows, enable_gqa=True)

    makers: dict[str, Callable[[], Peer]] = {
        f"softmax SDPA, {name}": partial(Peer, by(backend)) for name, backend in BACKENDS.items()
    }
    if not only_sdpa:
        makers["softmax FlexAttention"] = partial(Peer, flex)
        makers["softmax FlashInfer"] = lambda: Peer(flashinfer(inputs, paged))
    if not only_sdpa and alpha > 1:
        makers["entmax, bmm + AdaSplash's Triton"] = lambda: Peer(adasplash(q_rows, k_rows, v_rows, alpha), alpha)
    packages = {
        "softmax FlashInfer": ("flashinfer", "flashinfer-python"),
        "entmax, bmm + AdaSplash's Triton": ("adasplash", "adasplash"),
    }

    found: dict[str, Peer] = {}
    for name, make in makers.items():
        module, package = packages.get(name, ("torch", "torch"))
        if find_spec(module) is None:
            notes[name] = f"needs {package} (pip install {package})"
        elif name != "softmax SDPA, math" or not found:
            try:
                peer = make()
                peer.call()
                found[name] = peer
            except Exception as error:  # an error of another implementation must not end the run
                notes[name] = why(error)
    return found
