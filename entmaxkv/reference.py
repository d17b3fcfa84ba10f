"""The formulas of entmaxkv in plain PyTorch: a slow float64 oracle that imports nothing from the package.

Every function handles one row of a batch. `q_heads` is a multiple of `kv_heads`. Query head h reads KV head h // group,
where group = q_heads / kv_heads. The query is at position tokens - 1. A formula is evaluated in `dtype`: in float64 for
the truth, in a kernel's own type for the error that the kernel may have.
"""

import math

import torch
from torch import Tensor


def entmax(s: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Entmax weights over the last dimension.

    p = [z - tau]_+^(1/(alpha-1)) with z = (alpha-1) s and tau such that sum p = 1. tau lies in [max z - 1, max z], and
    sum p falls as tau rises. So tau is found by bisection, until no number lies between the ends.

    Args:
        s: [..., tokens], scores.
        alpha: in [1, 2]; 1 is softmax, 2 is sparsemax.

    Returns:
        p [..., tokens] and tau [...]; for alpha = 1, tau = logsumexp(s).

    Example:
        >>> entmax(torch.tensor([1.0, 0.5, -9.0]), 2.0)
        (tensor([0.7500, 0.2500, 0.0000]), tensor(0.2500))
    """
    if alpha == 1:
        return s.softmax(-1), s.logsumexp(-1)
    z = (alpha - 1) * s
    top = z.amax(-1, keepdim=True)
    z = z - top
    low, high = torch.full_like(top, -1), torch.zeros_like(top)
    while True:
        middle = (low + high) / 2
        if ((middle == low) | (middle == high)).all():
            break
        heavy = (z - middle).clamp(min=0).pow(1 / (alpha - 1)).sum(-1, keepdim=True) >= 1
        low, high = torch.where(heavy, middle, low), torch.where(heavy, high, middle)
    return (z - low).clamp(min=0).pow(1 / (alpha - 1)), (top + low).squeeze(-1)


def scores(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Attention scores s_i = scale q·k_i + slope (i - position).

    Args:
        q: [q_heads, head_dim].
        k: [tokens, kv_heads, head_dim].
        scale: default 1/sqrt(head_dim).
        alibi_slopes: [q_heads].
        dtype: type of the arithmetic.

    Returns:
        s [q_heads, tokens].
    """
    tokens, kv_heads, head_dim = k.shape
    scale = head_dim**-0.5 if scale is None else scale
    q = q.to(dtype).view(kv_heads, -1, head_dim)
    s = scale * (q @ k.to(dtype).permute(1, 2, 0)).flatten(0, 1)
    if alibi_slopes is not None:
        offset = torch.arange(1 - tokens, 1, device=k.device)
        s = s + alibi_slopes.to(dtype)[:, None] * offset.to(dtype)
    return s


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    alpha: float | Tensor = 1.5,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    keep: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Entmax attention of one query row: out = sum_i p_i v_i.

    Args:
        q: [q_heads, head_dim].
        k: [tokens, kv_heads, head_dim].
        v: [tokens, kv_heads, head_dim].
        alpha: in [1, 2], for all heads or [q_heads].
        scale: default 1/sqrt(head_dim).
        alibi_slopes: [q_heads].
        keep: [kv_heads, tokens], bool; the tokens to attend to, default all.
        dtype: type of the arithmetic.

    Returns:
        out [q_heads, head_dim], p [q_heads, tokens], tau [q_heads]; zeros for a head that has no token.
    """
    kv_heads, group = k.shape[1], q.shape[0] // k.shape[1]
    s = scores(q, k, scale=scale, alibi_slopes=alibi_slopes, dtype=dtype)
    keep = torch.ones_like(s, dtype=torch.bool) if keep is None else keep.repeat_interleave(group, 0)
    s = s.masked_fill(~keep, -math.inf)
    p, tau = torch.zeros_like(s), s.new_zeros(s.shape[0])
    head_alpha = torch.as_tensor(alpha, device=s.device).double().expand(s.shape[0])
    for a in head_alpha.unique().tolist():
        heads = (head_alpha == a) & keep.any(-1)
        if heads.any():
            p[heads], tau[heads] = entmax(s[heads], a)
    out = p.view(kv_heads, group, -1) @ v.to(dtype).transpose(0, 1)
    return out.flatten(0, 1), p, tau


def gather(pages: Tensor, page_table_row: Tensor, seq_len: int) -> Tensor:
    """The tokens of one row in order: token i is in slot i % page_size of logical page i // page_size.

    Args:
        pages: [pages, kv_heads, page_size, head_dim], k_pages or v_pages.
        page_table_row: [max_pages], int32, logical to physical page.
        seq_len: tokens in the row.

    Returns:
        [seq_len, kv_heads, head_dim].
    """
    token = torch.arange(seq_len, device=pages.device)
    page_size = pages.shape[2]
    return pages[page_table_row[token // page_size].long(), :, token % page_size]


def page_lengths(seq_len: int, page_size: int) -> list[int]:
    """Tokens in each page of a row: page_size, and the rest in the last one."""
    return [min(page_size, seq_len - first) for first in range(0, seq_len, page_size)]


def page_bounds(k: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest key coordinate of each page.

    Args:
        k: [tokens, kv_heads, head_dim].
        page_size: tokens per page; the last page may have fewer.

    Returns:
        k_min and k_max, [pages, kv_heads, head_dim] in the type of k.
    """
    pages = k.split(page_size)
    return torch.stack([page.amin(0) for page in pages]), torch.stack([page.amax(0) for page in pages])


def page_moments(k: Tensor, page_size: int, *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation of each key coordinate of each page.

    Args:
        k: [tokens, kv_heads, head_dim].
        page_size: tokens per page; the last page may have fewer.
        dtype: type of the arithmetic.

    Returns:
        k_mean and k_std, [pages, kv_heads, head_dim] in ``dtype``.
    """
    pages = k.to(dtype).split(page_size)
    mean = torch.stack([page.mean(0) for page in pages])
    return mean, torch.stack([(page - m).square().mean(0).sqrt() for page, m in zip(pages, mean, strict=True)])


def rotate(k: Tensor, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """The rotation of the key sketch: random signs, zeros up to whole blocks of 64, then a Hadamard matrix.

    The matrix is orthonormal. It covers all dimensions, or each block of 64 where there are three blocks.

    Args:
        k: [..., head_dim].
        dtype: type of the arithmetic.

    Returns:
        [..., dims], dims = 64 ceil(head_dim / 64).
    """
    head_dim = k.shape[-1]
    dims = -(-head_dim // 64) * 64
    signs = []
    for d in range(head_dim):
        word = (d + 1) * 0x9E3779B9 % 2**32
        word = (word ^ word >> 16) * 0x85EBCA6B % 2**32
        word = (word ^ word >> 13) * 0xC2B2AE35 % 2**32
        signs.append(1 - 2 * (word >> 31))
    x = torch.nn.functional.pad(k.to(dtype) * torch.tensor(signs, dtype=dtype, device=k.device), (0, dims - head_dim))
    size = 64 if dims == 192 else dims
    matrix = torch.ones(1, 1, dtype=dtype, device=k.device)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    rotated: Tensor = (x.unflatten(-1, (-1, size)) @ matrix / size**0.5).flatten(-2)
    return rotated


def sketch_codes(codes: Tensor) -> Tensor:
    """The codes of 4 bits, by coordinate.

    Args:
        codes: [..., 2, row_bytes] uint8, the planes of high and of low bits; byte 16 b + i holds the coordinates
            64 b + i, + 16, + 32 and + 48, from its low bits on.

    Returns:
        [..., 4 row_bytes], in 0 ... 15.
    """
    shift = torch.arange(0, 8, 2, device=codes.device)[:, None]
    plane: Tensor = (codes.long().unflatten(-1, (-1, 1, 16)) >> shift & 3).flatten(-3)
    return 4 * plane[..., 0, :] + plane[..., 1, :]


def sketch_values(codes: Tensor, norms: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The values that a key sketch has for rotated keys, and how far off they may be.

    Args:
        codes: [..., 2, row_bytes] uint8.
        norms: [..., 3] uint8: scale, norms of the coarse and of the fine distance.

    Returns:
        Coarse and fine values, [..., dims] each, and the most that the key is away from either, [...] each, in
        float64.
    """
    code = sketch_codes(codes).double()
    scale, coarse, fine = norms.double().unbind(-1)
    step = 2 ** ((scale - 112) / 8)
    root = step * code.shape[-1] ** 0.5
    values = ((code / 4).floor() - 1.5) * 15 / 16 * step[..., None], (code - 7.5) / 4 * step[..., None]
    return *values, coarse * root / 256, fine * root / 1024


def score_pages(
    q: Tensor,
    k_min: Tensor,
    k_max: Tensor,
    seq_len: int,
    page_size: int,
    *,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    lower: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Upper bound U of each page's scores: sum_d max(c q_d k_min,d, c q_d k_max,d) + the best bias in the page.

    With `lower` above 0 it is (U + lower L) / (1 + lower), where L is the lower bound.

    Args:
        q: [q_heads, head_dim].
        k_min: [pages, kv_heads, head_dim], of the pages in use.
        k_max: [pages, kv_heads, head_dim].
        seq_len: tokens in the row.
        page_size: tokens per page.
        scale: c, default 1/sqrt(head_dim).
        alibi_slopes: [q_heads].
        lower: the weight of the lower bound.
        dtype: type of the arithmetic.

    Returns:
        [q_heads, pages].
    """
    pages, kv_heads, head_dim = k_min.shape
    scale = head_dim**-0.5 if scale is None else scale
    q = scale * q.to(dtype).view(kv_heads, -1, 1, head_dim)
    k_min, k_max = (k.to(dtype).transpose(0, 1)[:, None] for k in (k_min, k_max))
    upper, below = (f(q * k_min, q * k_max).sum(-1).flatten(0, 1) for f in (torch.maximum, torch.minimum))
    if alibi_slopes is not None:
        first = torch.arange(pages, device=q.device) * page_size
        last = (first + page_size).clamp(max=seq_len) - 1
        slope = alibi_slopes.to(dtype)[:, None]
        ends = slope * (first - seq_len + 1), slope * (last - seq_len + 1)
        upper, below = upper + torch.maximum(*ends), below + torch.minimum(*ends)
    return (upper + lower * below) / (1 + lower) if lower > 0 else upper


def score_gaussian(
    q: Tensor,
    k_mean: Tensor,
    k_std: Tensor,
    seq_len: int,
    page_size: int,
    *,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the scores in each page, as if the coordinates of its keys were independent.

    mean = c q·k_mean + slope (mean offset), std² = c² sum_d q_d² k_std,d² + slope² (n² - 1) / 12, n tokens.

    Args:
        q: [q_heads, head_dim].
        k_mean: [pages, kv_heads, head_dim], of the pages in use.
        k_std: [pages, kv_heads, head_dim].
        seq_len: tokens in the row.
        page_size: tokens per page.
        scale: c, default 1/sqrt(head_dim).
        alibi_slopes: [q_heads].
        dtype: type of the arithmetic.

    Returns:
        mean and std, [q_heads, pages] each.
    """
    pages, kv_heads, head_dim = k_mean.shape
    scale = head_dim**-0.5 if scale is None else scale
    q = scale * q.to(dtype).view(kv_heads, -1, head_dim)
    mean = (q @ k_mean.to(dtype).permute(1, 2, 0)).flatten(0, 1)
    variance = (q.square() @ k_std.to(dtype).square().permute(1, 2, 0)).flatten(0, 1)
    if alibi_slopes is not None:
        n = torch.tensor(page_lengths(seq_len, page_size), device=q.device).to(dtype)
        first = (torch.arange(pages, device=q.device) * page_size - (seq_len - 1)).to(dtype)
        slope = alibi_slopes.to(dtype)[:, None]
        mean = mean + slope * (first + (n - 1) / 2)
        variance = variance + slope.square() * (n.square() - 1) / 12
    return mean, variance.sqrt()


def select_pages(scores: Tensor, seq_len: int, kv_heads: int, page_size: int, budget: int) -> Tensor:
    """The last page, then the pages of highest merit while a whole page still fits the budget.

    The merit of a page is its largest `page_log_softmax` over the heads of the group. Of equal pages the lower one
    comes first.

    Args:
        scores: [q_heads, pages] float32, finite, of the pages in use.
        seq_len: tokens in the row.
        kv_heads: heads of the cache.
        page_size: tokens per page.
        budget: tokens to keep, at least 1.

    Returns:
        keep [kv_heads, pages], bool.
    """
    pages = scores.shape[1]
    merit = page_log_softmax(scores.view(kv_heads, -1, pages)).amax(1)
    merit[:, -1] = math.inf
    room = max(0, budget - page_lengths(seq_len, page_size)[-1]) // page_size
    best = merit.sort(dim=-1, descending=True, stable=True).indices[:, : 1 + room]
    return torch.zeros_like(merit, dtype=torch.bool).scatter_(1, best, True)


def page_log_softmax(scores: Tensor) -> Tensor:
    """The logarithm of every page's weight in the softmax of a head's page scores, up to a constant of the group.

    exp and log are linear between powers of two, as in the ops. The weights are whole numbers then, which any device
    sums to the same bits.

    Args:
        scores: [kv_heads, group, pages], float32, finite.

    Returns:
        [kv_heads, group, pages], float32; 0 for the best page of the head whose best page has the largest weight.
    """
    distance = scores - scores.amax(-1, keepdim=True)
    halvings = (distance * -(2**16 / math.log(2))).clamp(max=2**21 - 1).long()
    weights = ((2**17 - halvings % 2**16) << 14) >> halvings // 2**16
    logarithm = weights.sum(-1, keepdim=True).float().view(torch.int32)
    excess = (logarithm - logarithm.amin(1, keepdim=True)).double() * (math.log(2) / 2**23)
    return distance - excess.float()


def mean_power(m: Tensor, t: Tensor, beta: float) -> Tensor:
    """E[Y_+^beta] for Y ~ N(m, t²): closed forms for beta 1, 2 and 3, else the integral on a grid.

    Args:
        m: [...], float64.
        t: [...], float64, at least 0.
        beta: at least 1.

    Returns:
        [...], float64.
    """
    t = t.clamp(min=1e-150)
    r = m / t
    cdf: Tensor = torch.special.ndtr(r)
    pdf: Tensor = (-r.square() / 2).exp() / math.sqrt(2 * math.pi)
    if abs(beta - 1) < 1e-6:
        return (m * cdf + t * pdf).clamp(min=0)
    if abs(beta - 2) < 1e-6:
        return ((m**2 + t**2) * cdf + m * t * pdf).clamp(min=0)
    if abs(beta - 3) < 1e-6:
        return ((m**3 + 3 * m * t**2) * cdf + (m**2 * t + 2 * t**3) * pdf).clamp(min=0)
    # Steps grow from the start on: the integrand starts as a fractional power, which an even grid integrates badly.
    end = 10 + 2 * math.sqrt(beta)
    start = (-r).clamp(-end, end)[..., None]
    u = torch.linspace(0, 1, 129, dtype=m.dtype, device=m.device)
    x = start + (end - start) * u**2
    y = (m[..., None] + t[..., None] * x).clamp(min=0)
    density = (-x.square() / 2).exp() / math.sqrt(2 * math.pi) * 2 * u * (end - start)
    return torch.trapezoid(y**beta * density, u)


def gaussian_threshold(mean: Tensor, std: Tensor, lengths: Tensor, alpha: float) -> Tensor:
    """tau of the page mixture: sum n E[Y_+^beta] = 1, Y ~ N((alpha-1) mean - tau, ((alpha-1) std)²) per page.

    Args:
        mean: [q_heads, pages].
        std: [q_heads, pages].
        lengths: [pages], tokens in each page, or anything that broadcasts with the rest.
        alpha: in (1, 2].

    Returns:
        [q_heads], float64.
    """
    m, t = (alpha - 1) * mean.double(), (alpha - 1) * std.double()

    def mass(tau: Tensor) -> Tensor:
        return (lengths * mean_power(m - tau, t, 1 / (alpha - 1))).sum(-1, keepdim=True)

    low = m.amax(-1, keepdim=True) - 1
    step = torch.ones_like(low)
    while (heavy := mass(low + step) > 1).any():
        step = torch.where(heavy, 2 * step, step)
    high = low + step
    for _ in range(40):
        middle = (low + high) / 2
        heavy = mass(middle) > 1
        low, high = torch.where(heavy, middle, low), torch.where(heavy, high, middle)
    return low.squeeze(-1)


def select_gaussian(
    mean: Tensor,
    std: Tensor,
    seq_len: int,
    kv_heads: int,
    page_size: int,
    *,
    alpha: float | Tensor = 1.5,
    quantile: float = 0.99,
    margin: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The last page, and every page whose best token is likely to exceed the threshold of the page mixture.

    A head selects a page of n tokens where (alpha-1) (mean + std Phi^-1(quantile^(1/n))) - tau + margin > 0. A page
    is selected when any head of the group selects it. alpha = 1 has no zeros, so there every page is selected.

    Args:
        mean: [q_heads, pages], of the pages in use.
        std: [q_heads, pages].
        seq_len: tokens in the row.
        kv_heads: heads of the cache.
        page_size: tokens per page.
        alpha: in [1, 2], for all heads or [q_heads].
        quantile: in (0, 1); the larger, the more pages.
        margin: in units of z; the larger, the more pages.

    Returns:
        keep [kv_heads, pages], bool, and the left side of the inequality, [q_heads, pages].
    """
    n = torch.tensor(page_lengths(seq_len, page_size), device=mean.device, dtype=torch.float64)
    excess = torch.full_like(mean, math.inf, dtype=torch.float64)
    head_alpha = torch.as_tensor(alpha, device=mean.device).double().expand(mean.shape[0])
    for a in head_alpha.unique().tolist():
        heads = head_alpha == a
        if a > 1:
            best = (a - 1) * (mean[heads].double() + std[heads].double() * torch.special.ndtri(quantile ** (1 / n)))
            excess[heads] = best - gaussian_threshold(mean[heads], std[heads], n, a)[:, None] + margin
    keep = (excess > 0).view(kv_heads, -1, mean.shape[1]).any(1)
    keep[:, -1] = True
    return keep, excess
