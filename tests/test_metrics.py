"""`measure` against the oracle and against bytes counted by hand."""

import pytest
import torch

import entmaxkv
from entmaxkv import reference
from entmaxkv.metrics import measure

DENSE = None
SELECTORS = {
    "dense": DENSE,
    "TopPages(64)": entmaxkv.TopPages(64),
    "Gaussian": entmaxkv.Gaussian(),
    "all": entmaxkv.TopPages(1 << 20),
    "KeySketch": entmaxkv.KeySketch(),
    "KeySketch, 2 bits": entmaxkv.KeySketch(bits=2),
    "KeySketch, 20 tokens": entmaxkv.KeySketch(max_tokens=20),
}


def filled(lengths, *, kv_heads=2, head_dim=64, page_size=16, dtype=torch.float32):
    torch.manual_seed(0)
    cache = entmaxkv.PagedKVCache(len(lengths), max(lengths) + 5, kv_heads, head_dim, page_size=page_size, dtype=dtype)
    k, v = (torch.randn(len(lengths), max(lengths), kv_heads, head_dim, dtype=dtype) for _ in range(2))
    cache.append(k, v, torch.tensor(lengths, dtype=torch.int32))
    return cache, 3 * torch.randn(len(lengths), 2 * kv_heads, head_dim, dtype=dtype)


def kept(select, q, cache, b, seq_len, **options):
    """keep [kv_heads, seq_len] of one row, token by token."""
    keep = torch.zeros(cache.kv_heads, seq_len, dtype=torch.bool)
    if isinstance(select, entmaxkv.KeySketch):
        selected, counts, *_ = select.select(q, cache, entmaxkv.Scoring(**options))
        for head in range(cache.kv_heads):
            keep[head, selected[b, head, : counts[b, head]].long()] = True
        return keep
    selected, counts, *_ = select.select(q, cache, entmaxkv.Scoring(**options))
    for head in range(cache.kv_heads):
        for page in selected[b, head, : counts[b, head]].tolist():
            keep[head, page * cache.page_size : (page + 1) * cache.page_size] = True
    return keep


@pytest.mark.parametrize("select", SELECTORS.values(), ids=SELECTORS)
@pytest.mark.parametrize("alpha", [1.0, 1.5, torch.tensor([1.5, 2.0, 4 / 3, 1.0])], ids=["1", "1.5", "per head"])
@pytest.mark.parametrize("slopes", [None, torch.tensor([0.0, 0.01, 0.1, 1.0])], ids=["", "alibi"])
def test_against_the_oracle(select, alpha, slopes):
    lengths = [0, 1, 100, 333]
    cache, q = filled(lengths)
    options = {"alpha": alpha, "alibi_slopes": slopes}
    found = measure(q, cache, select=select, **options)
    _, info = entmaxkv.decode(q, cache, select=select, return_info=True, **options)
    assert torch.equal(found.support, info.support)
    rows_read = pages = 0
    for b, seq_len in enumerate(lengths):
        if seq_len == 0:
            assert found.dropped_mass[b].tolist() == [0] * 4
            assert found.support_recall[b].tolist() == [1] * 4
            assert found.output_error[b].tolist() == [0] * 4
            continue
        k, v = (reference.gather(x, cache.page_table[b], seq_len) for x in (cache.k_pages, cache.v_pages))
        keep = torch.ones(2, seq_len, dtype=torch.bool)
        if select is not DENSE:
            keep = kept(select, q, cache, b, seq_len, **options)
        dense, p, _ = reference.attention(q[b], k, v, **options)
        sparse, weight, _ = reference.attention(q[b], k, v, keep=keep, **options)
        for head in range(4):
            read = keep[head // 2]
            torch.testing.assert_close(found.dropped_mass[b, head], p[head][~read].sum(), atol=1e-12, rtol=0)
            recall = (p[head][read] > 0).sum() / (p[head] > 0).sum()
            torch.testing.assert_close(found.support_recall[b, head], recall.double(), check_dtype=False)
            error = (sparse[head] - dense[head]).norm() / dense[head].norm()
            torch.testing.assert_close(found.output_error[b, head], error, atol=1e-5, rtol=0)
        assert found.tokens[b].tolist() == keep.sum(1).tolist()
        values = (weight > 0).view(2, 2, seq_len).any(1)
        rows_read += int(keep.sum() + values.sum())
        pages += -(-seq_len // 16)
    index_bytes = 0 if select is DENSE else 2 * 2 * pages * 64 * 4
    if isinstance(select, entmaxkv.KeySketch):
        refined = torch.zeros_like(found.tokens)
        if select.bits == 4:
            refined = entmaxkv.KeySketch(bits=2).select(q, cache, entmaxkv.Scoring(**options)).counts
        assert torch.equal(found.refined, refined)
        sampled = 1 + 100 + 2 * 64  # two heads
        index_bytes = 2 * (sum(lengths) * (16 + 2) + sampled * 64 * 4) + int(refined.sum()) * (16 + 1)
    assert found.index_bytes == index_bytes
    assert found.bytes_read == rows_read * 64 * 4 + index_bytes
    assert found.kv_bytes == 2 * 2 * sum(lengths) * 64 * 4
    assert found.share == found.bytes_read / found.kv_bytes
    assert (found.dropped_mass <= found.delta_bound.double() + 1e-12).all()
    assert torch.equal(found.certified, found.delta_bound == 0)


@pytest.mark.parametrize("tokens", [20, 127, 129, 40000])
def test_at_most_64_keys_of_a_head_are_scored(tokens):
    cache, q = filled([tokens], kv_heads=1)
    found = measure(q, cache, select=entmaxkv.KeySketch(bits=2))
    assert found.index_bytes == tokens * (16 + 2) + min(tokens, 2 * 64) * 64 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dense_loses_nothing(dtype):
    cache, q = filled([500], dtype=dtype)
    found = measure(q, cache, select=None)
    assert found.dropped_mass.max() == 0 and found.support_recall.min() == 1
    assert found.output_error.max() < 16 * torch.finfo(dtype).eps
    assert found.kv_bytes / 2 < found.bytes_read < found.kv_bytes
    assert found.tokens.tolist() == [[500, 500]]


def test_error_is_bounded_by_the_dropped_mass():
    cache, q = filled([400])
    dense = entmaxkv.decode(q, cache).double()
    longest = cache.v_pages[cache.page_table[0, :25].long()].double().norm(dim=-1).max()
    for budget in (16, 64, 256, 400):
        found = measure(q, cache, select=entmaxkv.TopPages(budget))
        bound = 2 * longest * found.dropped_mass / dense.norm(dim=-1)
        assert (found.output_error <= bound + 1e-5).all()


def test_selector_without_its_statistics():
    cache = entmaxkv.PagedKVCache(1, 16, 1, 64, minmax=False)
    cache.append(torch.randn(1, 16, 1, 64), torch.randn(1, 16, 1, 64))
    with pytest.raises(ValueError, match=r"expected page bounds"):
        measure(torch.randn(1, 1, 64), cache, select=entmaxkv.TopPages(16))
