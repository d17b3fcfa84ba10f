"""Keys, values and queries of the shipped model on real text: the Python standard library, held-out files first.

The model reads the text in windows, each by itself and at most as long as the model's context. A longer input is made
of several windows, and positions start at 0 in each. Keys and queries are taken after RoPE, as attention sees them.

A KV head of head_dim 64 is one (layer, KV head) pair of the model. A wider head is several pairs side by side: their
scores add up, and the usual scale, 1 / sqrt(head_dim), gives the sum the spread of one score. If a row needs more heads
than the model has, the next text gives the rest. The queries of a group are those of the last position, then of the
positions before it. All of them see the whole context, also the few tokens behind their own position.
"""

import math
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

import entmaxkv
from bench.examples import MODEL, SEPARATOR, Watch, default_source, files, held_out, with_cache
from bench.inputs import DTYPES, Case, Inputs

BATCH = {"cpu": 1, "cuda": 8}  # windows that the model reads at a time


def text(size: int) -> bytes:
    """The first `size` bytes of the standard library's files, held-out files first."""
    found = files(default_source())
    joined = bytearray()
    for name in sorted(found, key=lambda name: (not held_out(name), name)):
        joined += found[name].read_bytes() + SEPARATOR
        if len(joined) >= size:
            return bytes(joined[:size])
    raise SystemExit(f"--keys model: expected {size} bytes of Python files in {default_source()}, got {len(joined)}")


class ModelText:
    """The keys, values and queries of the model's heads after each window, enough for all of the given cases.

    Attributes:
        k, v: [windows, window, heads, head_dim]; a head is a (layer, KV head) pair.
        q: [windows, heads, queries, head_dim], the queries of the last position first.
    """

    def __init__(self, cases: list[Case], device: str, console: Console) -> None:
        try:
            import entmaxkv.hf
        except ImportError as error:
            raise SystemExit("--keys model: expected transformers (pip install 'transformers>=5'), got none") from error
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        model: Any = AutoModelForCausalLM.from_pretrained(MODEL, attn_implementation=entmaxkv.hf.NAME, dtype=dtype)
        model.to(device)
        config = model.config
        self.head_dim: int = config.head_dim
        self.heads: int = config.num_hidden_layers * config.num_key_value_heads
        for case in cases:
            if case.head_dim % self.head_dim:
                raise SystemExit(
                    f"--keys model: expected --head-dim to be a multiple of {self.head_dim}, got {case.head_dim}"
                )
        longest = max(case.context for case in cases)
        self.window: int = max(64, min(config.max_position_embeddings, longest))
        group = config.num_attention_heads // config.num_key_value_heads
        steps = max(-(-case.heads // (case.kv_heads * group)) for case in cases)
        windows = max(case.batch * self._texts(case) * self._windows(case) for case in cases)

        read = torch.frombuffer(bytearray(text(windows * self.window)), dtype=torch.uint8)
        batches = read.view(windows, self.window).long().split(BATCH[device])
        found = [
            self._read(model, batch.to(device), steps)
            for batch in track(batches, f"the model reads {windows} x {self.window} bytes", console=console)
        ]
        self.q, self.k, self.v = (torch.cat(parts) for parts in zip(*found, strict=True))

    @torch.no_grad()
    def _read(self, model: Any, ids: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of the windows ids [batch, window]; the last `steps` positions are decoded one by one."""
        batch, window = ids.shape
        cache = entmaxkv.hf.EntmaxCache(model.config, window, batch=batch)
        # One token comes first. A prefill of an empty cache would be done by AdaSplash where it is installed, which
        # searches for its launch settings for minutes.
        for chunk in ids[:, :-steps].split([1, window - steps - 1], dim=1):
            model(input_ids=chunk, **with_cache(model, cache), logits_to_keep=1)
        seen: list[Tensor] = []
        cache.select = Watch(lambda q, cache, scoring: seen.append(q))
        for position in range(window - steps, window):
            model(input_ids=ids[:, position : position + 1], **with_cache(model, cache))
        layers = [layer.paged for layer in cache.paged_layers]
        # [steps, layers, batch, KV heads, group, head_dim], the last step first
        q = torch.stack(seen).view(steps, len(layers), batch, layers[0].kv_heads, -1, self.head_dim).flip(0)
        q = q.permute(2, 1, 3, 0, 4, 5).reshape(batch, self.heads, -1, self.head_dim)

        def tokens(pools: list[Tensor]) -> Tensor:
            """[batch, window, heads, head_dim] from the layers' pages; the pages of a row follow one another."""
            pages = torch.stack([pool.unflatten(0, (batch, -1)) for pool in pools])
            # [layers, batch, pages, KV heads, page_size, head_dim] to tokens of all heads
            return pages.permute(1, 2, 4, 0, 3, 5).reshape(batch, -1, self.heads, self.head_dim)[:, :window]

        return q, tokens([layer.k_pages for layer in layers]), tokens([layer.v_pages for layer in layers])

    def _windows(self, case: Case) -> int:
        return -(-case.context // self.window)

    def _texts(self, case: Case) -> int:
        """How many texts give the heads of one row."""
        return math.ceil(case.kv_heads * case.head_dim / (self.heads * self.head_dim))

    def inputs(self, case: Case) -> Inputs:
        """The case's queries, keys and values; its contexts end where a window ends."""
        windows, texts = self._windows(case), self._texts(case)
        group, parts = case.heads // case.kv_heads, case.head_dim // self.head_dim
        taken = case.kv_heads * parts

        def joined(pieces: list[Tensor]) -> Tensor:
            """The case's heads [..., KV heads, head_dim] from the texts' [..., heads, head_dim]."""
            heads = torch.cat(pieces, dim=-2)[..., :taken, :]
            wide: Tensor = heads.unflatten(-2, (case.kv_heads, parts)).flatten(-2)
            return wide

        def tokens(windowed: Tensor, ends: list[int]) -> Tensor:
            """k or v [context, KV heads, head_dim] from the texts whose windows end at `ends`."""
            return joined([windowed[end - windows : end].flatten(0, 1)[-case.context :] for end in ends])

        rows = [[(row * texts + i + 1) * windows for i in range(texts)] for row in range(case.batch)]
        queries = [joined([self.q[end - 1, :, :group].transpose(0, 1) for end in ends]) for ends in rows]
        q = torch.stack([row.transpose(0, 1).flatten(0, 1) for row in queries])
        k, v = (torch.stack([tokens(windowed, ends) for ends in rows]) for windowed in (self.k, self.v))
        return Inputs(*(x.to(DTYPES[case.dtype]) for x in (q, k, v)))
