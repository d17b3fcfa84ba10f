"""The core builds without torch, also with sanitizers, and decodes as float64 numpy does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

SCRIPT = """
import numpy as np
import entmaxkv_core_numpy as core

rng = np.random.default_rng(0)
batch, tokens, kv_heads, group, head_dim = 2, 2100, 2, 4, 80
cache = core.Cache(batch, 2200, kv_heads, head_dim, page_size=8)
k, v = rng.standard_normal((2, batch, tokens, kv_heads, head_dim), dtype=np.float32)
q = rng.standard_normal((batch, kv_heads * group, head_dim), dtype=np.float32)
for begin, end in ((0, 2071), (2071, 2072), (2072, tokens)):
    cache.append(np.ascontiguousarray(k[:, begin:end]), np.ascontiguousarray(v[:, begin:end]))
cache.renew_statistics()

s = np.einsum("bhgd,bnhd->bhgn", q.reshape(batch, kv_heads, group, head_dim).astype(float), k) / head_dim**0.5
for alpha in (1.25, 1.5, 2.0):
    z = (alpha - 1) * s
    low, high = z.max(-1, keepdims=True) - 1, z.max(-1, keepdims=True)
    for _ in range(60):
        middle = (low + high) / 2
        above = (np.maximum(z - middle, 0) ** (1 / (alpha - 1))).sum(-1, keepdims=True) > 1
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    p = np.maximum(z - low, 0) ** (1 / (alpha - 1))
    want = np.einsum("bhgn,bnhd->bhgd", p, v).reshape(q.shape)
    dense = cache.decode(q, alpha)
    assert np.abs(dense - want).max() < 1e-5, alpha
    assert (cache.decode(q, alpha, budget=10 * tokens) == dense).all()
    assert np.isfinite(cache.decode(q, alpha, budget=100)).all()
    assert np.isfinite(cache.decode(q, alpha, budget=-1)).all()
assert np.isfinite(cache.decode(q, 1.0)).all()
print("ok")
"""


@pytest.mark.parametrize("sanitize", ["", "address,undefined", "thread"], ids=["plain", "address", "thread"])
def test_core_alone(sanitize: str, tmp_path: Path) -> None:
    configure = ["cmake", "-G", "Ninja", "-S", ROOT, "-B", tmp_path, f"-DSANITIZE={sanitize}"]
    subprocess.run([*configure, f"-DPython_EXECUTABLE={sys.executable}"], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", tmp_path], check=True, stdout=subprocess.DEVNULL)
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    if sanitize:
        name = "libtsan.so" if sanitize == "thread" else "libasan.so"
        found = subprocess.run(["c++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        # The interpreter frees some memory only by exiting, which the sanitizer would report as leaks.
        env |= {"LD_PRELOAD": found.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0"}
    for width in ("avx512",) if sanitize else ("avx512", "avx2", "default"):
        env["ATEN_CPU_CAPABILITY"] = width
        run = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True)
        assert run.returncode == 0 and run.stdout == "ok\n", run.stdout + run.stderr
