"""Entmax attention and its paged cache for Hugging Face transformers (5.17 and later), without patching it.

Importing this module registers the attention implementation `entmaxkv` and its mask:

    import entmaxkv.hf
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="entmaxkv")
    cache = entmaxkv.hf.EntmaxCache(model.config, max_tokens=16384, select=entmaxkv.KeySketch())
    model.generate(**inputs, past_key_values=cache)

alpha is `config.entmax_alpha` or `EntmaxCache(alpha=...)`. Where neither states it, the call raises. A config.json may
say `"attn_implementation": "entmaxkv"`. Then plain `from_pretrained(path)` loads the model with this implementation,
and fails where this module was not imported.

Decode steps (one query) use `select`; prefill is exact. Training, and reading a whole prompt at once, use AdaSplash
where alpha is 1.5 on a GPU, and PyTorch where alpha is 1. Where alpha is 1, layers with windows, chunks or masks of
their own run in PyTorch's attention and keep transformers' own cache. Anything else raises, and the message names it.
"""

from torch.nn.modules.module import register_module_module_registration_hook

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.utils.versions import require_version

    require_version("transformers>=5.17")
except ImportError as error:
    wanted = "transformers >= 5.17 (pip install 'transformers>=5.17,<5.40')"
    raise ImportError(f"entmaxkv.hf: expected {wanted}, got {type(error).__name__}: {error}") from error

from entmaxkv.hf.attend import attention
from entmaxkv.hf.cache import EntmaxCache
from entmaxkv.hf.layer import EntmaxLayer
from entmaxkv.hf.masking import mask
from entmaxkv.hf.models import NAME, check_when_built

__all__ = ["NAME", "EntmaxCache", "EntmaxLayer", "attention", "mask"]

AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)
register_module_module_registration_hook(check_when_built)
