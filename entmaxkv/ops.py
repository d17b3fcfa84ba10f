"""The torch ops of the library, `torch.ops.entmaxkv.*`: one wrapper, docstring and fake kernel each.

Sizes: `q_heads` is a multiple of `kv_heads`; the `group` = q_heads / kv_heads query heads h, h + 1, ... share KV head
h // group. A cache is a pool `k_pages`, `v_pages` [pages, kv_heads, page_size, head_dim] (any strides, last dimension
contiguous; page_size a power of two in 8 ... 128, head_dim <= 256; float32, float16 or bfloat16), a `page_table`
[batch, max_pages] int32 from logical to physical pages, and `seq_lens` [batch] int32, the tokens in each row. The
query is the newest token: its position is seq_len - 1. A row with seq_len 0 decodes to zeros.

Scores are s_i = scale q.k_i + slope (i - position), `scale` by default 1 / sqrt(head_dim), `alibi_slopes` [q_heads]
float32 or None. `alpha` is a number in [1, 2] for all heads; `head_alpha` [q_heads] float32, if given, replaces it.

No op has a gradient. Backward through a result raises NotImplementedError, and so does forward-mode differentiation;
ops that write to a cache raise RuntimeError where a tensor requires a gradient and gradients are recorded, since that
gradient would be lost. A key of NaN makes the heads that read it NaN.

Every op raises RuntimeError "entmaxkv::op: argument: expected ..., got ..." before it writes anything. Values behind
CUDA pointers (ids, lengths, head_alpha) cannot be looked at without waiting for the device. There ids are trusted,
lengths are cut to what the page table has room for, and tokens beyond a full cache are dropped. A head whose alpha is
not in [1, 2] decodes to NaN, with support 0 and, from `select_sketch`, delta_bound 1.

Threads, on the CPU. Ops run without the interpreter's lock, and each reads the lengths once, when it starts.

- Any number of ops that only read a cache (scoring, selecting, decoding) may run beside appends to it. Each sees the
  tokens below the lengths that it has read, and those are whole: an append moves the lengths last. Statistics of a
  row's last page may already count keys of an append under way. That only loosens its minimum and maximum.
- A step of several ops, such as `select_sketch` and then `sparse_decode`, reads the lengths once in each. Give all of
  them the same copy, `seq_lens.clone()`, where the step must see one state of the cache, as `entmaxkv.decode` does.
- Appends to the same rows (the same memory of `seq_lens`) wait for each other, and each claims its room or raises.
- `page_stats`, `build_sketch`, and whatever else writes to the tensors of a cache, such as clearing or shortening rows
  or changing `page_table`, must not run beside any op on the same rows. Nor may another thread write to `selected`
  while an op reads it.

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
    for name in names:
        library = here / f"{name}.abi3.so"
        if library.exists():
            torch.ops.load_library(str(library))
    build = "run `pip install --no-build-isolation --editable .` in its source tree"
    if not hasattr(torch.ops.entmaxkv, "append_kv"):
        raise ImportError(
            f"entmaxkv is not built: no _C library in {here}; {build}, or, where it is installed without --editable, "
            "start Python elsewhere"
        )
    if not hasattr(torch.ops.entmaxkv, "constants"):
        raise ImportError(f"entmaxkv: expected a _C library of this version in {here}, got an older one; {build}")


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
    """Appends tokens and their sketch to every row in place and renews the statistics of the pages they touch.

    `seq_lens` moves last: an interrupted call leaves tokens and lengths as they were (the statistics of the last page
    may already count new keys, which loosens its bounds until the next append). Who shortens `seq_lens` afterwards
    renews the statistics by `page_stats`.

    A page that is written must be in use in one place of the page table only: rows may share the full pages of a
    common prefix, but not the page that their next tokens go to. The CPU refuses to append otherwise. CUDA cannot look
    at the page table without waiting, and trusts it: there rows that share such a page overwrite each other's keys.

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
        RuntimeError: a row would outgrow its page table, among others; nothing is written then.
    """
    cache = k_pages, v_pages, k_min, k_max, k_mean, k_std, page_table, seq_lens, codes, norms
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0 or torch._C._any_requires_grad(k, v, *cache):
        _ops.append_kv(k, v, lengths, *cache)
        return
    with torch._C._AutoDispatchBelowAutograd():  # spares the look at every argument below
        _ops.append_kv(k, v, lengths, *cache)


def build_sketch(k_pages: Tensor, page_table: Tensor, seq_lens: Tensor, codes: Tensor, norms: Tensor) -> None:
    """Rebuilds the sketch of every key in the cache, for caches that were filled without `append_kv`.

    A key is rotated, r = H S k, with random signs S and orthonormal Hadamard blocks H, and each coordinate of r gets a
    code c of 4 bits in steps of s / 4: fine value (c - 7.5) s / 4, and from its high 2 bits, plane 0, the coarse value
    15/16 (floor(c / 4) - 1.5) s. `norms` holds the scale of s, 2^((scale - 112) / 8), and bounds of how far either
    value is from r: coarse s sqrt(dims) / 256 and fine s sqrt(dims) / 1024, dims = 64 ceil(head_dim / 64). A scale of
    255 marks keys that are not finite or larger than a sketch can be: they count as possible candidates always.

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

    Rows may share pages that all of them fill. A page that two rows fill to different places gets the statistics of
    one of them, which do not bound the other's keys.

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
    """Upper bounds of the scores of every page, or with `lower` what pages are ranked by.

    U = scale sum_d max(q_d k_min_d, q_d k_max_d) + the best ALiBi bias in the page is at least every s_i in it, L, of
    the minima and the worst bias, at most. The score of a page is (U + lower L) / (1 + lower).

    Args:
        q: [batch, q_heads, head_dim].
        k_min, k_max: [pages, kv_heads, head_dim], q's dtype.
        page_table: [batch, max_pages] int32.
        seq_lens: [batch] int32.
        page_size: tokens per page.
        scale: default 1 / sqrt(head_dim).
        alibi_slopes: [q_heads] float32 or None.
        lower: what the lower bound counts, 0 ... 1. On a GPU q times it is rounded to q's dtype.

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
    """Mean and standard deviation of the scores of every page, its coordinates taken as independent.

    mean = scale q.k_mean, std^2 = scale^2 sum_d q_d^2 k_std_d^2; the ALiBi biases of the page's tokens add their own
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

    The last page is always kept. The others are ranked by their largest share in the softmax of a head's scores, over
    the group's heads: one that cannot tell its pages apart does not crowd out those that can. Ties go to the lower
    page. exp and log are linear between powers of two here, so that every backend finds the same bits: the logarithms
    of shares of different heads may be off by 0.12. A head whose scores are NaN has no say.

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

    Scores of a page are taken as N(mean, std^2). Per head, tau solves sum_pages tokens E[(z - tau)_+^beta] = 1 with
    z = (alpha - 1) s and beta = 1 / (alpha - 1). A page is kept where some head of the group has
    (alpha - 1)(mean + std Phi^-1(quantile^(1 / page_size))) > tau - margin: where the best of its tokens is expected,
    at that quantile, to reach the threshold. The last page is always kept; alpha = 1 has no threshold and keeps all.

    Args:
        mean, std: [batch, q_heads, max_pages] float32, from `score_gaussian`.
        seq_lens: [batch] int32.
        kv_heads: number of KV heads.
        page_size: tokens per page.
        alpha: in [1, 2].
        quantile: between 0 and 1; higher keeps more.
        margin: in units of z; higher keeps more, inf keeps every page.
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
    """The tokens that may have weight, by the bounds that the key sketch proves.

    As rotations keep products, |q.k - q.value| <= ||q|| ||r - value||: an upper bound of every score s_i. The threshold
    on the exact scores of some tokens, those with the highest bounds in each stretch of the cache, is at most that on
    all: a token is a candidate where its bound exceeds it, for some head of the group. Every token with weight is one,
    unless alpha is 1.

    Args:
        q: [batch, q_heads, head_dim].
        k_pages: [pages, kv_heads, page_size, head_dim], q's dtype.
        codes, norms: the key sketch, as in `build_sketch`.
        page_table: [batch, max_pages] int32.
        seq_lens: [batch] int32.
        alpha: in [1, 2]; with 1 every token is a candidate, of a row of more than max_tokens those whose bounds are
            above 24 less than the logsumexp of the exact scores.
        scale: default 1 / sqrt(head_dim).
        alibi_slopes: [q_heads] float32 or None.
        head_alpha: [q_heads] float32 or None.
        bits: 4, or 2 for the first plane alone.
        certainty: 1 proves; at less, bounds count on the random signs, and each holds with that probability.
        max_tokens: most tokens to select for each KV head, None for any number. Of more candidates those are kept to
            which their bounds leave most weight, in steps of about a tenth that are kept or left out as a whole.

    Returns:
        selected: [batch, kv_heads, min(max_pages * page_size, max_tokens)] int32, tokens in ascending order, padded
            with -1.
        counts: [batch, kv_heads] int32, tokens selected.
        delta_bound: [batch, q_heads] float32, at least the weight of all tokens that were not selected; 0 where none
            of them has any.
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

    p_i = [z_i - tau]_+^beta with sum p = 1, out = sum p_i v_i. Keys are read once, value rows only where p > 0.

    Args:
        q: [batch, q_heads, head_dim].
        k_pages, v_pages: [pages, kv_heads, page_size, head_dim], q's dtype.
        page_table: [batch, max_pages] int32.
        seq_lens: [batch] int32.
        selected: [batch, kv_heads, max_selected] int32, logical pages or tokens, ascending.
        counts: [batch, kv_heads] int32, how many of them count; 0 gives zeros.
        alpha: in [1, 2].
        scale: default 1 / sqrt(head_dim).
        alibi_slopes: [q_heads] float32 or None.
        head_alpha: [q_heads] float32 or None.
        by_token: whether `selected` lists tokens.

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
    """Exact alpha-entmax attention over the whole cache: `sparse_decode` of every page, bit for bit.

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
    """`score_pages` as `TopPages` calls it, `select_pages` and `sparse_decode` in one call.

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
    """What the schema of an op says, and its kernel for tensors without memory.

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
    """Results that depend on what requires a gradient, and have none."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., Any], *arguments: Any) -> Any:
        return run(*arguments)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(_NO_GRADIENT)


def _refuse_tangents(name: str, arguments: tuple[object, ...]) -> None:
    """Forward-mode differentiation would take the tangents that results do not have for zeros."""
    for value in arguments:
        if isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            raise NotImplementedError(f"entmaxkv::{name}: expected tensors without tangents, got a dual tensor")


def _register_autograd(op: _Op) -> None:
    """Sees to it that no derivative is lost in silence.

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
            its = next(n for n, x in zip(op.arguments, arguments, strict=False) if any_requires_grad(x))
            raise RuntimeError(
                f"entmaxkv::{name}: {its}: expected a tensor that requires no gradient, or torch.no_grad(), got one "
                "whose gradient would be lost; to train, see entmaxkv.hf"
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
