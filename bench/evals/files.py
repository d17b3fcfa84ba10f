"""Reads files of real activations.

The file is a safetensors file. For each KV head NAME it holds NAME.k and NAME.v [tokens, head_dim], and NAME.q [group,
steps, head_dim]: the queries of the last `steps` positions. A query sees the tokens up to its own position.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file


def load(path: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [steps, heads, head_dim], k and v [tokens, kv_heads, head_dim]."""
    try:
        file = load_file(path)
    except (OSError, SafetensorError) as error:
        raise SystemExit(f"{path}: expected a safetensors file, got {error}") from error
    names = sorted({name.rsplit(".", 1)[0] for name in file})
    shapes = {name: tuple(x.shape) for name, x in file.items()}
    if not names or set(file) != {f"{name}.{part}" for name in names for part in "qkv"}:
        raise SystemExit(f"{path}: expected tensors NAME.q, NAME.k and NAME.v, got {sorted(file)}")
    for name in names:
        q_shape, k_shape, v_shape = (shapes[f"{name}.{part}"] for part in "qkv")
        fits = len(k_shape) == 2 and v_shape == k_shape == shapes[f"{names[0]}.k"] and len(q_shape) == 3
        if not fits or q_shape != shapes[f"{names[0]}.q"] or q_shape[2] != k_shape[1] or q_shape[1] > k_shape[0]:
            expected = "q [group, steps, head_dim] and k, v [tokens, head_dim], the same for all, steps <= tokens"
            raise SystemExit(f"{path}: expected {expected}, got {shapes}")
    k, v = (torch.stack([file[f"{name}.{part}"] for name in names], dim=1) for part in "kv")
    q = torch.cat([file[f"{name}.q"] for name in names]).transpose(0, 1)
    return q, k, v
