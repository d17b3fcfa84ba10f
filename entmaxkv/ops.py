"""The torch ops of the library, `torch.ops.entmaxkv.*`: a typed wrapper with the documentation of each.

Sizes. `q_heads` is a multiple of `kv_heads`. Query head h reads KV head h // group, where group = q_heads / kv_heads. A
cache has a pool of pages, a page table and lengths:

- `k_pages`, `v_pages` [pages, kv_heads, page_size, head_dim] in float32, float16 or bfloat16. The last dimension is
  contiguous, other strides are free. page_size is a power of two in 8 ... 128, and head_dim is at most 256.
- `page_table` [batch, max_pages] int32 maps logical to physical pages.
- `seq_lens` [batch] int32 counts the tokens of each row. The query is the newest token, at position seq_len - 1. A row
  with seq_len 0 decodes to zeros.

Scores. s_i = scale q.k_i + slope (i - position). `scale` is 1 / sqrt(head_dim) where it is None. `alibi_slopes`
[q_heads] float32 are the slopes, or None for none. `alpha` is a number in [1, 2] for all heads, unless `head_alpha`
[q_heads] float32 is given.

Gradients. No op has one. Backward through a result and forward-mode differentiation raise NotImplementedError. An op
that writes to a cache raises RuntimeError where a tensor requires a gradient and gradients are recorded, since that
gradient would be lost.

Errors. An op raises RuntimeError "entmaxkv::op: argument: expected ..., got ..." before it writes anything. A key of
NaN is no error: it makes the heads that read it NaN. Values in CUDA memory (ids, lengths, head_alpha) cannot be looked
at without waiting for the device. There ids are trusted, lengths are cut to what the page table has room for, and
tokens beyond a full cache are dropped. A head whose alpha is not in [1, 2] decodes to NaN. Its support is 0, and its
delta_bound from `select_sketch` is 1.

Threads, on the CPU. Ops run without the interpreter's lock, and each reads the lengths once, when it starts.

- Any number of ops that only read a cache (scoring, selecting, decoding) may run beside appends to it. Each sees the
  tokens below the lengths that it has read. These tokens are complete, because an append moves the lengths last. The
  statistics of a row's last page may already count keys of an append that has not ended. That only loosens the minimum
  and the maximum.
- A step of several ops, such as `select_sketch` and then `sparse_decode`, reads the lengths once in each op. Where the
  step must see one state of the cache, give all its ops the same copy, `seq_lens.clone()`. `entmaxkv.decode` does so.
- Appends to the same rows (the same memory of `seq_lens`) wait for each other. Each finds room for its tokens or
  raises.
- `page_stats`, `build_sketch` and everything else that writes to the tensors of a cache must not run beside any op on
  the same rows. That includes clearing or shortening rows and changing `page_table`. Nor may another thread write to
  `selected` while an op reads it.

On CUDA, ops run in the order of their stream. Whoever uses one cache from two streams must order them.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad


def _load() -> None:
    """Loads _C, and _cuda where this torch has CUDA."""
    here = Path(__file__).parent
    names = ["_C", "_cuda"] if torch.version.cuda else ["_C"]
    loaded = [name for name in names if (here / f"{name}.abi3.so").exists()]
    for name in loaded:
        torch.ops.load_library(str(here / f"{name}.abi3.so"))
    build = "run `pip install --no-build-isolation --editable .` in its source tree"
    if not hasattr(torch.ops.entmaxkv, "append_kv"):
        raise ImportError(
            f"entmaxkv is not built: no _C library in {here}; {build}, or, where it is installed without --editable, "
            "start Python elsewhere"
        )
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    if not hasattr(torch.ops.entmaxkv, "constants"):
        raise ImportError(f"entmaxkv: expected a _C library of this version in {here}, got an older one; {build}")
    if "_cuda" in loaded and not has_kernel("entmaxkv::build_sketch", "CUDA"):
        raise ImportError(
            f"entmaxkv: expected a _cuda library of this version in {here}, got an older one; {build}, or remove it"
        )


_load()
_ops = torch.ops.entmaxkv


class Constants(NamedTuple):
    """Numbers that Python shares with the kernels.

    Attributes:
        max_head_dim: the largest head_dim.
        min_page_size, max_page_size: the smallest and the largest page_size.
        sketch_block: head_dim is rounded up to a multiple of it in the key sketch.
        sketch_block_bytes: bytes of a key and a block in each plane of codes.
        exact_scores: tokens per query head that `select_sketch` scores exactly, at most.
        softmax_gap: alpha - 1 up to which the kernels take alpha for 1.
        rank_lower: `lower` of `score_pages` where pages are ranked.
    """

    max_head_dim: int
    min_page_size: int
    max_page_size: int
    sketch_block: int
    sketch_block_bytes: int
    exact_scores: int
    softmax_gap: float
    rank_lower: float


def constants() -> Constants:
    """The numbers that Python shares with the kernels, as C++ has them; `CONSTANTS` holds them."""
    return Constants(*_ops.constants())


CONSTANTS = constants()


def append_kv(
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    k_pages: Tensor,
    v_pages: Tensor,
    k_min: Tensor | None,
    k_max: Tensor | None,
    k_mean: Tensor | None,
    k_std: Tensor | None,
    page_table: Tensor,
    seq_lens: Tensor,
    codes: Tensor | None = None,
    norms: Tensor | None = None,
) -> None:
    """Appends tokens and their sketch to every row in place, and renews the statistics of the pages that they touch.

    `seq_lens` moves last, so an interrupted call leaves tokens and lengths as they were. The statistics of the last
    page may then count keys that are not there, which loosens its bounds until the next append. Call `page_stats` after
    shortening `seq_lens`.

    A page that is written must be in use in one place of the page table only. Rows may share the full pages of a
    common prefix, but not the page that their next tokens go to. The CPU refuses to append to a shared page. CUDA
    cannot look at the page table without waiting, so there rows that share such a page overwrite each other's keys.

    Args:
        k, v: [batch, tokens, kv_heads, head_dim], the cache's dtype.
        lengths: [batch] int32 or None. Row b appends its first lengths[b] tokens; None appends all.
        k_pages, v_pages: [pages, kv_heads, page_size, head_dim]. Written.
        k_min, k_max: [pages, kv_heads, head_dim] in the cache's dtype, or both None. Written.
        k_mean, k_std: [pages, kv_heads, head_dim] in the cache's dtype, or both None. Written.
        page_table: [batch, max_pages] int32.
        seq_lens: [batch] int32. Written.
        codes, norms: the key sketch, as in `build_sketch`, or both None. Written.

    Raises:
        RuntimeError: an argument does not fit, for example because a row would outgrow its page table. Nothing is
            written then.
    """
    cache = k_pages, v_pages, k_min, k_max, k_mean, k_std, page_table, seq_lens, codes, norms
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0 or torch._C._any_requires_grad(k, v, *cache):
        _ops.append_kv(k, v, lengths, *cache)
        return
    with torch._C._AutoDispatchBelowAutograd():  # spares the look at every argument below
        _ops.append_kv(k, v, lengths, *cache)


def build_sketch(k_pages: Tensor, page_table: Tensor, seq_lens: Tensor, codes: Tensor, norms: Tensor) -> None:
    """Rebuilds the sketch of every key in the cache, for caches that were filled without `append_kv`.

    A key k is rotated to r = H S k, with random signs S and orthonormal Hadamard blocks H. Each coordinate of r gets a
    code c of 4 bits:

    - Plane 0 holds the high 2 bits. They give the coarse value 15/16 (floor(c / 4) - 1.5) s.
    - Plane 1 holds the low 2 bits. Together they give the fine value (c - 7.5) s / 4.

    `norms` holds three numbers of each key, with dims = 64 ceil(head_dim / 64):

    - scale, which gives the key's step s = 2^((scale - 112) / 8). A scale of 255 marks a key that is not finite, or too
      large for a sketch. Such a key is always a candidate.
    - coarse: the coarse values are at most coarse s sqrt(dims) / 256 from r, in the Euclidean norm.
    - fine: the fine values are at most fine s sqrt(dims) / 1024 from r.

    Args:
        k_pages: [pages, kv_heads, page_size, head_dim].
        page_table: [batch, max_pages] int32.
        seq_lens: [batch] int32.
        codes: [pages, kv_heads, 2, page_size, ceil(head_dim / 64) * 16] uint8, the planes. Written.
        norms: [pages, kv_heads, 3, page_size] uint8: scale, coarse, fine. Written.
    """
    _ops.build_sketch(k_pages, page_table, seq_lens, codes, norms)


def page_stats(
    k_pages: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    k_min: Tensor | None,
    k_max: Tensor | None,
    k_mean: Tensor | None,
    k_std: Tensor | None,
) -> None:
    """Rebuilds the statistics of every page in use, for caches that were filled without `append_kv`.

    Per page, KV head and coordinate, over the page's tokens: minimum, maximum, mean, and population standard
    deviation. A key of NaN makes the first three NaN, so that no bound passes over it.

    Rows may share pages that each of them fills. A page that two rows fill up to different slots gets the statistics
    of one of them, which do not bound the other's keys.

    Args:
        k_pages: [pages, kv_heads, page_size, head_dim].
        page_table: [batch, max_pages] int32.
        seq_lens: [batch] int32.
        k_min, k_max: [pages, kv_heads, head_dim] in the cache's dtype, or both None. Written.
        k_mean, k_std: [pages, kv_heads, head_dim] in the cache's dtype, or both None. Written.
    """
    _ops.page_stats(k_pages, page_table, seq_lens, k_min, k_max, k_mean, k_std)


def score_pages(
    q: Tensor,
    k_min: Tensor,
    k_max: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    page_size: int,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    lower: float = 0.0,
) -> Tensor:
    """Upper bounds of the scores of every page, or a mean of the upper and the lower bound by which pages are ranked.

    The upper bound is U = scale sum_d max(q_d k_min_d, q_d k_max_d) + the best ALiBi bias in the page. The lower bound
    L takes the minima and the worst bias instead. The score of a page is (U + lower L) / (1 + lower).

    Args:
        q: [batch, q_heads, head_dim].
        k_min, k_max: [pages, kv_heads, head_dim], q's dtype.
        page_table: [batch, max_pages] int32.
        seq_lens: [batch] int32.
        page_size: tokens per page.
        scale: default 1 / sqrt(head_dim).
        alibi_slopes: [q_heads] float32 or None.
        lower: the weight of the lower bound, in 0 ... 1. A GPU rounds lower q to q's dtype.

    Returns:
        [batch, q_heads, max_pages] float32, in units of s; -inf for pages behind the last token.
    """
    result: Tensor = _ops.score_pages(q, k_min, k_max, page_table, seq_lens, page_size, scale, alibi_slopes, lower)
    return result


def score_gaussian(
    q: Tensor,
    k_mean: Tensor,
    k_std: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    page_size: int,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the scores of every page, as if the coordinates of its keys were independent.

    mean = scale q.k_mean, std^2 = scale^2 sum_d q_d^2 k_std_d^2. The ALiBi biases of the page's tokens add their own
    mean and variance.

    Args:
        q: [batch, q_heads, head_dim].
        k_mean, k_std: [pages, kv_heads, head_dim], q's dtype.
        page_table: [batch, max_pages] int32.
        seq_lens: [batch] int32.
        page_size: tokens per page.
        scale: default 1 / sqrt(head_dim).
        alibi_slopes: [q_heads] float32 or None.

    Returns:
        mean, std: [batch, q_heads, max_pages] float32, in units of s; -inf and 0 for pages behind the last token.
    """
    results: tuple[Tensor, Tensor] = _ops.score_gaussian(
        q, k_mean, k_std, page_table, seq_lens, page_size, scale, alibi_slopes
    )
    return results


def select_pages(scores: Tensor, seq_lens: Tensor, kv_heads: int, page_size: int, budget: int) -> tuple[Tensor, Tensor]:
    """The best pages of every KV head under a budget of tokens.

    The last page is always selected. The merit of another page is its largest weight, over the heads of the group, in
    the softmax of a head's page scores. So a head that cannot tell its pages apart does not displace the pages of heads
    that can. Of equal pages the lower one comes first. exp and log are linear between powers of two here, so that every
    backend finds the same bits. Logarithms of weights in different heads may be off by 0.12. A head whose scores are
    NaN does not count.

    Args:
        scores: [batch, q_heads, max_pages] float32, from `score_pages`.
        seq_lens: [batch] int32.
        kv_heads: number of KV heads.
        page_size: tokens per page.
        budget: tokens per KV head, at least 1; exceeded only where the last page alone is larger.

    Returns:
        selected: [batch, kv_heads, min(max_pages, ceil(budget / page_size))] int32, logical pages in ascending
            order, padded with -1.
        counts: [batch, kv_heads] int32, pages selected.
    """
    results: tuple[Tensor, Tensor] = _ops.select_pages(scores, seq_lens, kv_heads, page_size, budget)
    return results


def select_gaussian(
    mean: Tensor,
    std: Tensor,
    seq_lens: Tensor,
    kv_heads: int,
    page_size: int,
    alpha: float = 1.5,
    quantile: float = 0.99,
    margin: float = 0.0,
    head_alpha: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The pages that a Gaussian model of their scores expects to hold weight.

    The scores of a page are taken as N(mean, std^2). Per head, tau solves sum_pages tokens E[(z - tau)_+^beta] = 1 with
    z = (alpha - 1) s and beta = 1 / (alpha - 1). A page is selected where some head of the group expects its best token
    to reach the threshold at that quantile: (alpha - 1)(mean + std Phi^-1(quantile^(1 / page_size))) > tau - margin.
    The last page is always selected. alpha = 1 has no threshold: there all pages are selected.

    Args:
        mean, std: [batch, q_heads, max_pages] float32, from `score_gaussian`.
        seq_lens: [batch] int32.
        kv_heads: number of KV heads.
        page_size: tokens per page.
        alpha: in [1, 2].
        quantile: between 0 and 1; higher selects more.
        margin: in units of z; higher selects more, inf selects every page.
        head_alpha: [q_heads] float32 or None.

    Returns:
        selected: [batch, kv_heads, max_pages] int32, logical pages in ascending order, padded with -1.
        counts: [batch, kv_heads] int32, pages selected.
    """
    results: tuple[Tensor, Tensor] = _ops.select_gaussian(
        mean, std, seq_lens, kv_heads, page_size, alpha, quantile, margin, head_alpha
    )
    return results


def select_sketch(
    q: Tensor,
    k_pages: Tensor,
    codes: Tensor,
    norms: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    alpha: float = 1.5,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    head_alpha: Tensor | None = None,
    bits: int = 4,
    certainty: float = 1.0,
    max_tokens: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The candidates: the tokens that may have weight, by the bounds that the key sketch proves.

    Let r be the rotated key, value what the sketch says of it, and q' the rotated query. Rotations keep products, so
    |q.k - q'.value| <= ||q|| ||r - value||, which gives an upper bound of every score s_i. The floor of a head is the
    threshold on the exact scores of some tokens, those with the highest bounds in each part of the cache. That is at
    most the threshold on all tokens. A token is a candidate where its bound exceeds the floor of some head of the
    group. Unless alpha is 1, every token with weight is a candidate.

    Args:
        q: [batch, q_heads, head_dim].
        k_pages: [pages, kv_heads, page_size, head_dim], q's dtype.
        codes, norms: the key sketch, as in `build_sketch`.
        page_table: [batch, max_pages] int32.
        seq_lens: [batch] int32.
        alpha: in [1, 2]. With 1 every token of a row of at most max_tokens is a candidate. In a longer row those are
            candidates whose bound is above the logsumexp of the exact scores less 24.
        scale: default 1 / sqrt(head_dim).
        alibi_slopes: [q_heads] float32 or None.
        head_alpha: [q_heads] float32 or None.
        bits: 4 for both planes, 2 for plane 0 alone.
        certainty: 1 proves. Bounds of a lower certainty rely on the random signs, and each holds with that probability.
        max_tokens: most tokens to select for each KV head, None for any number. Of more candidates those are selected
            that their bounds leave most weight. Weights count in steps of about a tenth. The tokens of one step are
            selected or left out together.

    Returns:
        selected: [batch, kv_heads, min(max_pages * page_size, max_tokens)] int32, tokens in ascending order, padded
            with -1.
        counts: [batch, kv_heads] int32, tokens selected.
        delta_bound: [batch, q_heads] float32, an upper bound of the weight of all tokens that were not selected; 0
            where none of them has weight.
    """
    results: tuple[Tensor, Tensor, Tensor] = _ops.select_sketch(
        q,
        k_pages,
        codes,
        norms,
        page_table,
        seq_lens,
        alpha,
        scale,
        alibi_slopes,
        head_alpha,
        bits,
        certainty,
        max_tokens,
    )
    return results


def sparse_decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    selected: Tensor,
    counts: Tensor,
    alpha: float = 1.5,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    head_alpha: Tensor | None = None,
    by_token: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Exact alpha-entmax attention over the selected tokens, or those of the selected pages.

    p_i = [z_i - tau]_+^beta with sum p = 1, out = sum p_i v_i, where z = (alpha - 1) s and beta = 1 / (alpha - 1). Keys
    are read once, value rows only where p > 0.

    Args:
        q: [batch, q_heads, head_dim].
        k_pages, v_pages: [pages, kv_heads, page_size, head_dim], q's dtype.
        page_table: [batch, max_pages] int32.
        seq_lens: [batch] int32.
        selected: [batch, kv_heads, max_selected] int32, logical pages or tokens, ascending.
        counts: [batch, kv_heads] int32, how many of them are read; 0 gives zeros.
        alpha: in [1, 2].
        scale: default 1 / sqrt(head_dim).
        alibi_slopes: [q_heads] float32 or None.
        head_alpha: [q_heads] float32 or None.
        by_token: whether `selected` holds tokens.

    Returns:
        out: [batch, q_heads, head_dim], q's dtype. NaN for a head whose q holds NaN.
        tau: [batch, q_heads] float32, threshold in units of z; logsumexp(s) where alpha = 1.
        support: [batch, q_heads] int32, tokens with p > 0.
        tokens: [batch, kv_heads] int32, tokens whose keys were read.
    """
    results: tuple[Tensor, Tensor, Tensor, Tensor] = _ops.sparse_decode(
        q, k_pages, v_pages, page_table, seq_lens, selected, counts, alpha, scale, alibi_slopes, head_alpha, by_token
    )
    return results


def dense_decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    alpha: float = 1.5,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    head_alpha: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Exact alpha-entmax attention over the whole cache, to the bit that of `sparse_decode` with every page selected.

    Args:
        q: [batch, q_heads, head_dim].
        k_pages, v_pages: [pages, kv_heads, page_size, head_dim], q's dtype.
        page_table: [batch, max_pages] int32.
        seq_lens: [batch] int32.
        alpha: in [1, 2].
        scale: default 1 / sqrt(head_dim).
        alibi_slopes: [q_heads] float32 or None.
        head_alpha: [q_heads] float32 or None.

    Returns:
        out, tau, support, tokens: as in `sparse_decode`.
    """
    results: tuple[Tensor, Tensor, Tensor, Tensor] = _ops.dense_decode(
        q, k_pages, v_pages, page_table, seq_lens, alpha, scale, alibi_slopes, head_alpha
    )
    return results


def decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    k_min: Tensor,
    k_max: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    budget: int,
    alpha: float = 1.5,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    head_alpha: Tensor | None = None,
) -> Tensor:
    """`score_pages` with the `lower` of `TopPages`, `select_pages` and `sparse_decode` in one call.

    Args:
        q: [batch, q_heads, head_dim].
        k_pages, v_pages: [pages, kv_heads, page_size, head_dim], q's dtype.
        k_min, k_max: [pages, kv_heads, head_dim], q's dtype.
        page_table: [batch, max_pages] int32.
        seq_lens: [batch] int32.
        budget: tokens per KV head, at least 1.
        alpha: in [1, 2].
        scale: default 1 / sqrt(head_dim).
        alibi_slopes: [q_heads] float32 or None.
        head_alpha: [q_heads] float32 or None.

    Returns:
        [batch, q_heads, head_dim], q's dtype.
    """
    result: Tensor = _ops.decode(
        q,
        k_pages,
        v_pages,
        k_min,
        k_max,
        page_table,
        seq_lens,
        budget,
        alpha,
        scale,
        alibi_slopes,
        head_alpha,
    )
    return result


# Sizes of tensors, and dtypes of results, by the names that arguments and results have in the schemas.
_TENSORS = {
    "q": "[batch, q_heads, head_dim]",
    "k_pages": "[pages, kv_heads, page_size, head_dim]",
    "page_table": "[batch, max_pages]",
    "scores": "[batch, q_heads, max_pages] float32",
    "mean": "[batch, q_heads, max_pages] float32",
    "std": "[batch, q_heads, max_pages] float32",
    "selected": "[batch, kv_heads, max_selected] int32",
    "counts": "[batch, kv_heads] int32",
    "delta_bound": "[batch, q_heads] float32",
    "out": "[batch, q_heads, head_dim]",  # in q's dtype
    "tau": "[batch, q_heads] float32",
    "support": "[batch, q_heads] int32",
    "tokens": "[batch, kv_heads] int32",
}
_DTYPES = {"float32": torch.float32, "int32": torch.int32}
_UNNAMED = {"score_pages": "scores", "decode": "out"}  # the only result of an op has no name in the schema


class _Op:
    """An op's schema, and the fake kernel made from it.

    Attributes:
        name: without the namespace.
        arguments: by name, in order.
        results: names.
        writes: whether it writes to arguments.
    """

    def __init__(self, name: str) -> None:
        self.name, self.overload = name, getattr(_ops, name).default
        schema = self.overload._schema
        self.arguments = {argument.name: argument for argument in schema.arguments}
        self.results = [result.name or _UNNAMED[name] for result in schema.returns]
        self.writes = any(argument.alias_info and argument.alias_info.is_write for argument in schema.arguments)

    @property
    def is_differentiable(self) -> bool:
        """Whether a derivative could be lost in it; whole numbers have none."""
        return self.writes or any(not _TENSORS[name].endswith("int32") for name in self.results)

    def fake(self, *values: Any, **keywords: Any) -> Any:
        """New results of the right sizes, dtypes and device, with nothing in them."""
        given = {name: argument.default_value for name, argument in self.arguments.items()}
        given |= dict(zip(self.arguments, values, strict=False)) | keywords
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        first, like = next(iter(tensors.items()))
        sizes = {name: value for name, value in given.items() if name in ("kv_heads", "page_size")}
        for name, tensor in tensors.items():
            if tensor.device != like.device:
                self._refuse(name, f"the device of {first}, {like.device}", str(tensor.device))
            dims = _dims(_TENSORS.get(name, ""))
            if dims and len(dims) != tensor.dim():
                self._refuse(name, f"[{', '.join(dims)}]", f"shape {list(tensor.shape)}")
            sizes = dict(zip(dims, tensor.shape, strict=False)) | sizes
        if "selected" in self.results:
            sizes["max_selected"] = self._max_selected(given, sizes)
        results = [
            like.new_empty(
                [sizes[dim] for dim in _dims(_TENSORS[name])],
                dtype=_DTYPES.get(_TENSORS[name].split()[-1], like.dtype),
            )
            for name in self.results
        ]
        return results[0] if len(results) == 1 else tuple(results) or None

    def _max_selected(self, given: Mapping[str, Any], sizes: Mapping[str, int]) -> int:
        """The room for what is selected for one KV head."""
        room, most = sizes["max_pages"], None
        if self.name == "select_pages":
            most = (given["budget"] - 1) // sizes["page_size"] + 1
        elif self.name == "select_sketch":
            room, most = room * sizes["page_size"], given["max_tokens"]
        return room if most is None else min(room, most)

    def _refuse(self, argument: str, expected: str, got: str) -> None:
        raise RuntimeError(f"entmaxkv::{self.name}: {argument}: expected {expected}, got {got}")


def _dims(tensor: str) -> list[str]:
    """The sizes that a text of `_TENSORS` names."""
    return re.findall(r"[a-z_]+(?=[],])", tensor)


_NO_GRADIENT = (
    "entmaxkv: decoding has no gradient, got backward through it; wrap decoding in torch.no_grad(), and to train, see "
    "entmaxkv.hf"
)


class _NoGradient(torch.autograd.Function):
    """Makes results that depend on a tensor that requires a gradient, and that have no gradient themselves."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., Any], *arguments: Any) -> Any:
        return run(*arguments)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(_NO_GRADIENT)


def _refuse_tangents(name: str, arguments: tuple[object, ...]) -> None:
    """Raises for a dual tensor: forward-mode differentiation would take the missing tangents of results for zeros."""
    for value in arguments:
        if isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            raise NotImplementedError(f"entmaxkv::{name}: expected tensors without tangents, got a dual tensor")


def _register_autograd(op: _Op) -> None:
    """Makes an op raise where a derivative would be lost.

    An op that only returns results runs, and backward through its results raises. An op that writes raises at once
    where an argument requires a gradient: what it writes would be cut off from that gradient.
    """
    name, redispatch = op.name, op.overload.redispatch
    below_autograd = torch._C._AutoDispatchBelowAutograd
    after_autograd = torch._C._after_autograd_keyset
    records_gradients, any_requires_grad = torch.is_grad_enabled, torch._C._any_requires_grad
    without_gradient: Callable[..., Any] = _NoGradient.apply

    def autograd(keys: Any, *arguments: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(name, arguments)
        if records_gradients() and any_requires_grad(*arguments):
            return with_gradient(keys, *arguments)
        with below_autograd():
            return redispatch(keys & after_autograd, *arguments)

    def with_gradient(keys: Any, *arguments: Any) -> Any:
        if op.writes:
            argument = next(n for n, x in zip(op.arguments, arguments, strict=False) if any_requires_grad(x))
            raise RuntimeError(
                f"entmaxkv::{name}: {argument}: expected a tensor that requires no gradient, or torch.no_grad(), got "
                "one whose gradient would be lost; to train, see entmaxkv.hf"
            )
        if torch._C._are_functorch_transforms_active():  # they take no Function that they cannot transform
            raise NotImplementedError(_NO_GRADIENT)

        def run(*arguments: Any) -> Any:
            with below_autograd():
                return redispatch(keys & after_autograd, *arguments)

        return without_gradient(run, *arguments)

    _library.impl(name, autograd, "Autograd", with_keyset=True)


_library = torch.library.Library("entmaxkv", "IMPL")
for _name in torch._C._dispatch_get_all_op_names():
    if _name.startswith("entmaxkv::") and _name != "entmaxkv::constants":
        _op = _Op(_name.removeprefix("entmaxkv::"))
        torch.library.register_fake(_name, _op.fake)
        if _op.is_differentiable:
            _register_autograd(_op)
