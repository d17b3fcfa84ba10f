"""Times the authors' code, entmaxkv of github.com/deep-spin/entmaxkv, on the inputs that bench/decode.py hands to it.

Not to be run by hand: `bench/decode.py --reference CHECKOUT` starts it (bench/authors.py), in a process in which
`import entmaxkv` finds the authors' package. It reads q, k and v from a folder, and writes times and outputs there.

The authors' functions are called as the authors' tests call them:

- The threshold is refined twice, and the cache is filled beforehand.
- Inputs in bfloat16 are converted to float16: their kernels know float16 and float32 only.
- Dense entmax is their paged kernel, given every page. It takes groups of query heads.
- Their selectors take no groups. Each head of a group becomes a row of a batch over the same keys, with a budget of its
  own.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1]))
from bench.timing import medians

REFINEMENTS = 2
SPLITS, BINS = 32, 16  # the defaults of their decode functions


class Method(NamedTuple):
    """One way of the authors to decode.

    Attributes:
        call: Runs a step.
        out: Returns the step's output [batch, heads, head_dim].
        tokens: Returns how many tokens a head reads.
    """

    call: Callable[[], object]
    out: Callable[[], Tensor]
    tokens: Callable[[], float]


def filled(k: Tensor, v: Tensor, page_size: int) -> Any:
    """The authors' cache, filled with k and v [rows, kv_heads, tokens, head_dim].

    Its statistics are computed here, and equal those of the cache's own `initialize`. That method goes through the
    tokens page by page, and takes seconds for a million tokens.
    """
    from entmaxkv import PagedKVCache

    cache = PagedKVCache(page_size=page_size)
    cache.k_cache, cache.v_cache = k, v
    own = k[:1] if k.stride(0) == 0 else k  # rows that share keys share statistics
    pages = own.unflatten(2, (-1, page_size))
    statistics = pages.amin(3), pages.amax(3), pages.mean(3), pages.std(3, correction=0).clamp(min=1e-6)
    whole = (x.expand(len(k), -1, -1, -1).contiguous() for x in statistics)
    cache.k_min, cache.k_max, cache.k_mean, cache.k_std = whole
    return cache


def dense(q: Tensor, k: Tensor, v: Tensor, page_size: int, alpha: float) -> Method:
    """Dense entmax: the authors' paged kernel, given every page.

    Args:
        q: [batch, heads, head_dim].
        k, v: [batch, kv_heads, tokens, head_dim].
    """
    from entmaxkv.kernels.adadecode_paged import make_adadecode_paged_workspace, sparse_attention_decode_paged

    batch, heads, head_dim = q.shape
    kv_heads, tokens = k.shape[1:3]
    lengths = torch.full((batch,), tokens, dtype=torch.int32, device=q.device)
    pages = torch.arange(tokens // page_size, dtype=torch.int32, device=q.device)
    pages = pages.expand(batch, kv_heads, -1).contiguous()
    workspace = make_adadecode_paged_workspace(batch, heads, head_dim, SPLITS, BINS, device=q.device, dtype=q.dtype)
    query = q[:, :, None].contiguous()
    out = torch.empty_like(query)

    def call() -> None:
        sparse_attention_decode_paged(
            q=query,
            k_cache=k,
            v_cache=v,
            out=out,
            cache_seqlens=lengths,
            page_indices=pages,
            page_size=page_size,
            alpha=alpha,
            niter=REFINEMENTS,
            max_splits=SPLITS,
            bins=BINS,
            q_seqlens=lengths,
            workspace=workspace,
        )

    return Method(call, lambda: out[:, :, 0], lambda: tokens)


def selecting(q: Tensor, k: Tensor, v: Tensor, page_size: int, alpha: float, budgets: list[int]) -> dict[str, Method]:
    """The authors' selectors. The arguments have the shapes of those of `dense`."""
    from entmaxkv import sparse_attention_decode_gaussian_aware_entmax, sparse_attention_decode_paged

    batch, kv_heads, tokens = k.shape[:3]
    group = q.shape[1] // kv_heads
    rows = q.unflatten(1, (kv_heads, group)).transpose(1, 2).flatten(0, 1)[:, :, None].contiguous()
    k, v = (x[:, None].expand(-1, group, -1, -1, -1).flatten(0, 1) for x in (k, v))
    cache = filled(k, v, page_size)
    lengths = torch.full((len(rows),), tokens, dtype=torch.int32, device=q.device)
    result = torch.empty_like(rows)
    shared = {"q": rows, "kv_cache": cache, "k_new": None, "v_new": None, "out": result, "alpha": alpha}
    shared |= {"q_seqlens": lengths, "append_cache": False, "niter": REFINEMENTS}

    def out() -> Tensor:
        return result[:, :, 0].unflatten(0, (batch, group)).transpose(1, 2).flatten(1, 2)

    def top_pages(budget: int) -> Method:
        best = max(budget - page_size, 0)  # their kernel adds the last page
        read = page_size * (1 + min(best // page_size, tokens // page_size - 1))
        shorter = torch.full_like(lengths, read)

        def call() -> None:
            sparse_attention_decode_paged(**shared, token_budget=best, cache_seqlens=shorter)

        return Method(call, out, lambda: read)

    def gaussian(tau: str) -> Method:
        def call() -> None:
            sparse_attention_decode_gaussian_aware_entmax(**shared, tau_mode=tau)

        return Method(call, out, lambda: page_size * cache.last_num_selected_per_head.double().mean().item())

    methods = {f"authors, top pages, {budget} tokens": top_pages(budget) for budget in budgets}
    return methods | {f"authors, Gaussian, {tau} tau": gaussian(tau) for tau in ("exact", "corrected")}


@torch.no_grad()
def main() -> None:
    """Reads `order` and `inputs` from the folder, and writes `answer` and `outs` to it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="holds the inputs, and gets the results")
    folder = parser.parse_args().folder
    order = json.loads((folder / "order").read_text())
    inputs = load_file(folder / "inputs", device="cuda")
    dtype = torch.float16 if inputs["q"].dtype == torch.bfloat16 else inputs["q"].dtype
    q, k, v = (inputs[name].to(dtype) for name in "qkv")
    k, v = (x.transpose(1, 2).contiguous() for x in (k, v))
    if k.shape[2] % order["page_size"]:
        raise SystemExit(f"expected whole pages of {order['page_size']} tokens, got {k.shape[2]} tokens")
    shared = q, k, v, order["page_size"], order["alpha"]
    methods = {"authors, dense entmax": dense(*shared)} | selecting(*shared, order["budgets"])

    failures, outs, read = {}, {}, {}
    for name, method in list(methods.items()):
        try:
            method.call()
            outs[name], read[name] = method.out().contiguous(), method.tokens()
        except Exception as error:  # one method that fails here must not keep the others from being measured
            failures[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            del methods[name]
    times = medians({name: method.call for name, method in methods.items()}, order["repeats"], "cuda")
    short = {torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    rows = {
        name: {"dtype": short, "us": time.us, "timed": time.of, "tokens": read[name]} for name, time in times.items()
    }
    save_file(outs, folder / "outs")
    (folder / "answer").write_text(json.dumps({"rows": rows, "failures": failures}))


if __name__ == "__main__":
    main()
