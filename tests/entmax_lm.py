"""The shipped model for tests of the transformers integration, and an independent attention to compare with."""

from pathlib import Path

import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PreTrainedModel
from transformers.masking_utils import sdpa_mask

import entmaxkv.hf
from entmaxkv.reference import entmax

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "examples" / "stdlib-entmax"
TEXT = (ROOT / "examples" / "train" / "corpus.py").read_bytes()
ORACLE = "entmaxkv_test_oracle"


def oracle_attention(module, query, key, value, attention_mask, *, scaling, **kwargs):
    """Attention by the float64 oracle, all scores at once, over whatever cache transformers has."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    s = (scaling * query.double() @ key.double().transpose(2, 3)).masked_fill(~attention_mask, -torch.inf)
    p, _ = entmax(s, module.config.entmax_alpha)
    return (p.nan_to_num() @ value.double()).transpose(1, 2).to(query.dtype), None  # NaN where nothing is seen


def oracle_mask(*args, allow_is_causal_skip=True, **kwargs):
    return sdpa_mask(*args, allow_is_causal_skip=False, **kwargs)


AttentionInterface.register(ORACLE, oracle_attention)
AttentionMaskInterface.register(ORACLE, oracle_mask)


def load(implementation: str = entmaxkv.hf.NAME) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(MODEL, attn_implementation=implementation, dtype=torch.float32).eval()


def ids(*texts: bytes) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask of a left-padded batch."""
    width = max(map(len, texts))
    rows = torch.tensor([[0] * (width - len(text)) + list(text) for text in texts])
    mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])
    return rows, mask


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=2e-4)
