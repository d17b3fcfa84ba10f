"""build_sketch: codes by the formula, norms that bound the distance from above and closely, only slots in use."""

import pytest
import torch
from conftest import Cache, assert_same_bits, bits, cases, draw, make_cache
from torch import Tensor

from entmaxkv import reference

HEAD_DIMS = [33, 64, 80, 96, 128, 192, 256]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LARGEST = 2.0**17.5  # of the root mean square that a sketch can hold


def of_tokens(cache: Cache, sketch: tuple[Tensor, Tensor], row: int) -> tuple[Tensor, Tensor]:
    """codes [tokens, kv_heads, 2, row_bytes] and norms [tokens, kv_heads, 3] of a row."""
    token = torch.arange(len(cache.k[row]), device=cache.k_pages.device)
    page = cache.page_table[row, token // cache.page_size].long()
    codes, norms = (x[page, :, :, token % cache.page_size] for x in sketch)
    return codes, norms


def check(cache: Cache, sketch: tuple[Tensor, Tensor]) -> None:
    """Against the formula in float64, of which fp32 may fall to the other side of a rounding."""
    for row, k in enumerate(cache.k):
        codes, norms = of_tokens(cache, sketch, row)
        r = reference.rotate(k)
        dims = r.shape[-1]
        norm = r.norm(dim=-1)
        known = norms[..., 0] != 255
        assert torch.equal(known, norm / dims**0.5 < LARGEST)  # false for NaN
        assert (norms[~known] == 255).all() and (codes[~known] == 0).all()
        r, norm, codes, norms = r[known], norm[known], codes[known], norms[known]
        *values, coarse, fine = reference.sketch_values(codes, norms)
        step = 2 ** ((norms[:, 0].double() - 112) / 8)

        places = [8 * x.log2() + 112 for x in (1.13 * norm / dims**0.5, r.abs().amax(-1) / 2)]
        scale = norms[:, 0]
        nearest = (scale - places[0].clamp(min=0)).abs() <= 0.501
        enough = (scale >= places[1]) & (scale <= places[1].clamp(min=0) + 1.002)
        assert (nearest | enough).all()

        place = 4 * r / step[:, None] + 8
        got = reference.sketch_codes(codes)
        off = torch.where(got < 15, place - got - 1, 0).clamp(min=0) + torch.where(got > 0, got - place, 0).clamp(min=0)
        assert (off <= 1e-5 * (norm / step)[:, None] + 1e-6).all()

        for value, bound, unit in zip(values, (coarse, fine), (256, 1024), strict=True):
            distance = (r - value).norm(dim=-1)
            assert (distance <= bound).all()
            assert (bound <= distance * (1 + 1e-4) + norm * 1e-4 + 1.001 * step * dims**0.5 / unit).all()


def hard_keys(kind: str, head_dim: int = 64) -> Tensor:
    k = draw(100, 2, head_dim)
    if kind == "outlier channel":
        k[..., 3] += 1000
    elif kind == "constant":
        k = torch.full_like(k, 0.1)
    elif kind == "zero":
        k[:] = 0
    elif kind == "one spike":
        k[::3, :, 7:] = 0
        k[::3, :, :7] = 0
        k[::3, :, 5] = 30000
    elif kind == "one rotated spike":  # of the inverse rotation
        k = reference.rotate(torch.eye(head_dim)[0]).float()[:head_dim] * draw(100, 2, 1)
    elif kind == "large":
        k = k.sign() * 60000
    elif kind == "huge":
        k[::2] = 3e38
    elif kind == "tiny":
        k = k * 1e-30
    elif kind == "tiny among normal ones":
        k = k * 10.0 ** -torch.arange(100)[:, None, None]
    elif kind == "nan":
        k[::7, 1, 5] = torch.nan
    elif kind == "inf":
        k[::7, 0, 5] = torch.inf
        k[1::7, 0, 6] = -torch.inf
    return k


KINDS = ["normal", "outlier channel", "constant", "zero", "one spike", "one rotated spike", "large", "huge", "tiny"]
KINDS += ["tiny among normal ones", "nan", "inf"]


@cases
def test_agrees_with_the_oracle(case, device):
    cache = case.cache(device)
    check(cache, cache.sketch())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(device, head_dim, dtype):
    cache = make_cache([70, 3], head_dim=head_dim, dtype=dtype, device=device)
    check(cache, cache.sketch())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 192])
@pytest.mark.parametrize("kind", KINDS)
def test_hard_keys(device, kind, head_dim, dtype):
    cache = make_cache([100], k=[hard_keys(kind, head_dim)], head_dim=head_dim, dtype=dtype, device=device)
    check(cache, cache.sketch())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [33, 128])
def test_appending_equals_sketching(device, head_dim, dtype):
    """Bit for bit, whole or token by token; and what is behind the last token stays as it was."""
    like = make_cache([37, 0, 16], head_dim=head_dim, dtype=dtype, device=device)
    like.k[0][5] = torch.nan
    k, v = (torch.nn.utils.rnn.pad_sequence(rows, batch_first=True) for rows in (like.k, like.v))
    sketches = []
    for chunk in (37, 1):
        cache, sketch = like.clone(), like.blank_sketch()
        cache.seq_lens.zero_()
        for first in range(0, 37, chunk):
            lengths = (like.seq_lens - first).clamp(0, chunk)
            cache.append(k[:, first : first + chunk], v[:, first : first + chunk], lengths, sketch)
        sketches.append(sketch)
    assert_same_bits(sketches[0], cache.sketch())
    assert_same_bits(sketches[1], sketches[0])


def test_leaves_other_slots_alone(device):
    cache = make_cache([0, 20, 5], page_size=8, device=device)
    codes, norms = cache.sketch()
    unused = torch.ones(norms.shape[0], 8, dtype=torch.bool, device=device)
    for row, n in enumerate(cache.lengths):
        for token in range(n):
            unused[cache.page_table[row, token // 8].long(), token % 8] = False
    assert (codes.transpose(1, 3)[unused] == 77).all()
    assert (norms.permute(0, 3, 1, 2)[unused] == 77).all()
    assert not (norms.permute(0, 3, 1, 2)[~unused] == 77).all(-1).any()


def test_physical_order_changes_no_bit(device):
    cache = make_cache([100, 7], page_size=8, dtype=torch.float16, device=device)
    other = cache.permuted()
    for row in range(2):
        for x, y in zip(of_tokens(cache, cache.sketch(), row), of_tokens(other, other.sketch(), row), strict=True):
            assert torch.equal(bits(x), bits(y))
