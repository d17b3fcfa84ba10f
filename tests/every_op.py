"""A small case of every op on a GPU, for compute-sanitizer:

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool racecheck python tests/every_op.py
"""

import torch

import entmaxkv

OPS = torch.ops.entmaxkv


def run(dtype: torch.dtype, head_dim: int, group: int) -> None:
    torch.manual_seed(0)
    cache = entmaxkv.PagedKVCache(2, 70_000, 2, head_dim, dtype=dtype, device="cuda")
    statistics = cache.k_min, cache.k_max, cache.k_mean, cache.k_std
    k, v = (torch.randn(2, 300, 2, head_dim, device="cuda").to(dtype) for _ in range(2))
    cache.append(k, v, torch.tensor([300, 37], dtype=torch.int32, device="cuda"))
    for tokens in (1, 16):
        cache.append(k[:, :tokens], v[:, :tokens])
    OPS.page_stats(cache.k_pages, cache.page_table, cache.seq_lens, *statistics)
    OPS.build_sketch(cache.k_pages, cache.page_table, cache.seq_lens, cache.codes, cache.norms)
    for strength in (1.0, 0.01):
        q = (torch.randn(2, 2 * group, head_dim, device="cuda") * strength).to(dtype)
        for alpha in (1.5, 1.0, 1.05, 2.0):
            entmaxkv.decode(q, cache, alpha=alpha)  # with room for more tokens than a short list has
            entmaxkv.decode(q, cache, alpha=alpha, select=entmaxkv.TopPages(64, dense_below=0))
            for options in ({}, {"bits": 2}, {"max_tokens": 20}):
                entmaxkv.decode(q, cache, alpha=alpha, select=entmaxkv.KeySketch(dense_below=0, **options))
            if alpha > 1:
                entmaxkv.decode(q, cache, alpha=alpha, select=entmaxkv.Gaussian(dense_below=0))
    cache.append(*(torch.randn(2, 9000, 2, head_dim, device="cuda").to(dtype) for _ in range(2)))
    _, info = entmaxkv.decode((q * 0.01).to(dtype), cache, return_info=True)
    assert info.support.max() > 1024  # clusters solve, since there is room for more than 64K tokens
    scores = OPS.score_pages(q, cache.k_min, cache.k_max, cache.page_table, cache.seq_lens, 16)
    OPS.select_pages(scores, cache.seq_lens, 2, 16, 512)
    OPS.decode(q, cache.k_pages, cache.v_pages, cache.k_min, cache.k_max, cache.page_table, cache.seq_lens, 512)
    # A cluster of several blocks, with ties, rows of all lengths, and more heads than are looked at together.
    ties = -(torch.arange(11000, device="cuda") % 4).float().expand(2, 2 * group, 11000).contiguous()
    for scores, seq_lens, budget in ((ties, [176000, 17], 80000), (torch.randn_like(ties), [176000, 130000], 2000)):
        OPS.select_pages(scores, torch.tensor(seq_lens, dtype=torch.int32, device="cuda"), 2, 16, budget)
    torch.cuda.synchronize()


if __name__ == "__main__":
    run(torch.bfloat16, 64, 4)
    run(torch.float32, 33, 5)
