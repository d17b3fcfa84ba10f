"""sparse_decode: exact entmax attention over selected pages or tokens."""

import os

import pytest
import torch
from conftest import Cache, assert_same_bits, cases, check_decode, make_cache, make_query, selection, token_mask


def pick(cache: Cache, share: float, seed: int = 0) -> list[torch.Tensor]:
    """Random page masks [kv_heads, pages] per row, at least the last page."""
    generator, keep = torch.Generator().manual_seed(seed), []
    for row in range(len(cache.k)):
        mask = torch.rand(cache.k_pages.shape[1], len(cache.used(row)), generator=generator) < share
        mask[:, -1:] = True
        keep.append(mask.to(cache.k_pages.device))
    return keep


def select(cache: Cache, keep: list[torch.Tensor], extra: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return selection(keep, max(1, max(mask.shape[1] for mask in keep)) + extra, cache.k_pages.device.type)


@cases
def test_agrees_with_the_oracle(case, device):
    cache, q = case.cache(device), case.query(device)
    keep = pick(cache, 0.6)
    heads = {"alibi_slopes": case.slopes(device), "head_alpha": case.head_alpha(device)}
    got = cache.sparse(q, *select(cache, keep), case.alpha or 1.5, case.scale, **heads)
    check_decode(cache, q, got, alpha=case.alpha or 1.5, scale=case.scale, **heads, keep=keep)


@pytest.mark.parametrize("alpha", [1.0, 1.5, 1.75])
def test_long_rows(device, alpha):
    cache, q = make_cache([4097, 100, 3000], page_size=16, device=device), make_query(3, 8, 64, device=device)
    keep = pick(cache, 0.5)
    check_decode(cache, q, cache.sparse(q, *select(cache, keep), alpha), alpha=alpha, keep=keep)


@pytest.mark.parametrize("max_pages", [None, 400], ids=["tight", "roomy"])
@pytest.mark.parametrize("alpha", [1.0, 4 / 3, 1.5, 2.0])
def test_all_pages_are_dense_to_the_bit(device, alpha, max_pages):
    """Also where the page table has room for far more tokens than the selection."""
    seq_lens = [0, 1, 16, 17, 2000]
    cache = make_cache(seq_lens, page_size=16, dtype=torch.bfloat16, device=device, max_pages=max_pages)
    q = make_query(5, 8, 64, torch.bfloat16, device)
    for extra in (0, 3):
        assert_same_bits(cache.sparse(q, *select(cache, pick(cache, 2.0), extra), alpha), cache.dense(q, alpha))


@pytest.mark.parametrize("share", [0.5, 2.0])
@pytest.mark.parametrize("alpha", [1.0, 4 / 3, 1.5, 2.0])
def test_tokens_of_pages_give_what_the_pages_give(device, alpha, share):
    cache = make_cache([0, 1, 16, 17, 3000], page_size=16, dtype=torch.bfloat16, device=device)
    q = make_query(5, 8, 64, torch.bfloat16, device)
    keep = pick(cache, share)
    masks = [token_mask(mask, 16, len(k)) for mask, k in zip(keep, cache.k, strict=True)]
    chosen = selection(masks, 3003, device)
    got = cache.sparse(q, *chosen, alpha, by_token=True)
    check_decode(cache, q, got, alpha=alpha, keep=keep)
    want = cache.sparse(q, *select(cache, keep), alpha)
    torch.testing.assert_close(got.tau, want.tau, rtol=1e-6, atol=1e-6)
    assert torch.equal(got.tokens, want.tokens)


def test_lone_tokens(device):
    """Against a cache of these tokens alone."""
    cache, q = make_cache([300], page_size=16, device=device), make_query(1, 4, 64, device=device)
    tokens = torch.tensor([0, 5, 15, 16, 100, 101, 299])
    mask = torch.zeros(2, 300, dtype=torch.bool)
    mask[:, tokens] = True
    got = cache.sparse(q, *selection([mask], 9, device), by_token=True)
    k, v = (x[0][tokens.to(device)] for x in (cache.k, cache.v))
    check_decode(make_cache([7], k=[k], v=[v], page_size=16, device=device), q, got)


@pytest.mark.parametrize("keys", ["normal", "rising", "falling", "ties", "special"])
@pytest.mark.parametrize("alpha", [1.0, 1.06, 4 / 3, 1.5, 2.0])
def test_what_dense_decoding_leaves_out_has_no_weight(device, alpha, keys):
    """It gives the bits of a selection of all pages, wherever the high scores are."""
    q = make_query(1, 8, 64, device=device)
    k = make_cache([5000]).k[0]
    slope = torch.linspace(-1, 1, 5000)[:, None, None] * q[0, ::4].cpu() / 4  # [tokens, kv_heads, head_dim]
    k = {
        "normal": k,
        "rising": k / 8 + slope,
        "falling": k / 8 - slope,
        "ties": k.round() / 2,
        "special": torch.where(torch.arange(5000)[:, None, None] % 1667 == 5, -torch.inf, k.abs()),
    }[keys]
    if keys == "special":
        q = q.abs()
    cache = make_cache([5000], page_size=16, k=[k], device=device)
    want = cache.sparse(q, *select(cache, pick(cache, 2.0)), alpha)
    for _ in range(20 if device == "cuda" else 1):
        assert_same_bits(cache.dense(q, alpha), want)


def assert_same_on_a_gpu(device, got, want):
    """The same bits from the CUDA kernel; nearly the same numbers from the CPU kernel."""
    if device == "cuda" or "ENTMAXKV_EMULATION" in os.environ:
        assert_same_bits(got, want)
    else:
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("only_weights", [False, True])
@pytest.mark.parametrize("spread", [0.003, 0.02, 0.1, 1.0])
@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0])
def test_tokens_without_weight_change_no_bit(device, alpha, spread, only_weights):
    """On a GPU, whatever else is read beside the tokens with weight. Spread: from nearly all tokens to a few. The list
    has the tokens that any head could give weight, or hardly more than those that some head gives it."""
    cache = make_cache([9000, 5000], page_size=16, dtype=torch.bfloat16, device=device)
    q = make_query(2, 8, 64, torch.bfloat16, device) * spread
    want = cache.dense(q, alpha)
    masks = []
    for row, k in enumerate(cache.k):
        scores = torch.einsum("hd,nhd->hn", q[row].double(), k.double().repeat_interleave(4, 1)) / 8
        reach = scores.amax(-1, keepdim=True) - 1.01 / (alpha - 1)
        if only_weights:
            reach = want.tau[row].double()[:, None] / (alpha - 1) - 1e-5 * spread
        masks.append((scores > reach).view(2, 4, -1).any(1))
    got = cache.sparse(q, *selection(masks, 9000, device), alpha, by_token=True)
    assert_same_on_a_gpu(device, got[:3], want[:3])


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0])
def test_few_heads_with_many_tokens(device, alpha, group):
    """The CUDA kernel then solves a head by the blocks of a cluster, as there is room for more than 64K tokens."""
    cache = make_cache([9000], page_size=16, kv_heads=1, dtype=torch.bfloat16, device=device, max_pages=4200)
    q = make_query(1, group, 64, torch.bfloat16, device) * 0.0003
    got = cache.dense(q, alpha)
    assert got.support.max() > 2048
    check_decode(cache, q, got, alpha=alpha)
    everything = selection([torch.ones(1, 9000, dtype=torch.bool)], 9000, device)
    assert_same_bits(cache.sparse(q, *everything, alpha, by_token=True)[:3], got[:3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_with_weight_on_all_tokens(device, dtype):
    """The CUDA kernel reads a value once for several such heads of a group. Beside others they get the same bits."""
    cache = make_cache([5000], page_size=16, kv_heads=2, dtype=dtype, device=device)
    q = make_query(1, 14, 64, dtype, device)
    everywhere = [0, 2, 3, 5, 10, 12]  # heads of the two groups
    flat = q.clone()
    flat[:, everywhere] *= 1e-4
    got = cache.dense(flat, 1.5)
    assert (got.support == 5000).nonzero()[:, 1].tolist() == everywhere
    check_decode(cache, flat, got, alpha=1.5)
    for head in range(14):
        alone = q.clone()
        alone[:, head] = flat[:, head]
        beside_others = cache.dense(alone, 1.5)
        assert_same_on_a_gpu(device, *[[x[:, [head]] for x in result[:3]] for result in (beside_others, got)])


def test_a_selection_that_holds_the_support_gives_the_dense_result(device):
    cache, q = (
        make_cache([2000], page_size=16, kv_heads=1, device=device),
        make_query(1, 4, 64, device=device) * 30,
    )
    s = (cache.k[0][:, 0].double() @ q[0].double().T).T / 8 / 2
    near = s > s.amax(-1, keepdim=True) - 1.001
    pages = near.any(0).nonzero().flatten() // 16
    keep = torch.zeros(1, 125, dtype=torch.bool, device=device)
    keep[0, pages] = keep[0, -1] = True
    assert not keep.all()
    got, dense = cache.sparse(q, *select(cache, [keep])), cache.dense(q)
    check_decode(cache, q, got, keep=[keep])
    check_decode(cache, q, got._replace(tokens=dense.tokens))


def test_last_page_alone(device):
    cache, q = make_cache([33, 48, 1], page_size=16, device=device), make_query(3, 4, 64, device=device)
    keep = pick(cache, -1.0)
    got = cache.sparse(q, *select(cache, keep))
    check_decode(cache, q, got, keep=keep)
    assert got.tokens.tolist() == [[1, 1], [16, 16], [1, 1]]


def test_no_pages_give_zeros(device):
    cache, q = make_cache([33, 48], page_size=16, device=device), make_query(2, 4, 64, device=device)
    keep = pick(cache, 0.5)
    keep[1][:] = False
    got = cache.sparse(q, *select(cache, keep))
    check_decode(cache, q, got, keep=keep)
    for x in got:
        assert (x[1] == 0).all()


@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_room_for_no_page_gives_zeros(device, alpha):
    cache, q = make_cache([33, 0], page_size=16, device=device), make_query(2, 4, 64, device=device)
    none = torch.empty(2, 2, 0, dtype=torch.int32, device=device)
    for x in cache.sparse(q, none, torch.zeros(2, 2, dtype=torch.int32, device=device), alpha):
        assert (x == 0).all()


def test_reads_only_selected_pages(device):
    cache, q = make_cache([300], page_size=16, device=device), make_query(1, 4, 64, device=device)
    keep = pick(cache, 0.4)
    keep[0][1] = keep[0][0]
    want = cache.sparse(q, *select(cache, keep))
    for page in (~keep[0][0]).nonzero().flatten():
        cache.k_pages[cache.page_table[0, page]] = torch.nan
        cache.v_pages[cache.page_table[0, page]] = torch.nan
    assert_same_bits(cache.sparse(q, *select(cache, keep)), want)


def test_physical_order_rows_repeats_and_threads_change_no_bit(device, threads):
    cache, q = (
        make_cache([2500, 0, 40, 700], page_size=16, device=device),
        make_query(4, 8, 64, device=device),
    )
    chosen = select(cache, pick(cache, 0.5))
    want = cache.sparse(q, *chosen)
    for count in (1, 2):
        torch.set_num_threads(count)
        assert_same_bits(cache.sparse(q, *chosen), want)
        assert_same_bits(cache.permuted().sparse(q, *chosen), want)
    for row in range(4):
        one = slice(row, row + 1)
        assert_same_bits(cache.row(row).sparse(q[one], *(x[one] for x in chosen)), [x[one] for x in want])
