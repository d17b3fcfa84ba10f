"""Decoding with a language model: it reads a context once, and decodes after it as often as needed."""

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

import entmaxkv.hf
from bench.examples import fix_launches, with_cache
from entmaxkv.select import Selector

# No token is padding. Without this, transformers would look at a mask to find that out, and wait for the device.
UNMASKED = {"full_attention": None}


def load(path: Path, device: str) -> PreTrainedModel:
    """Loads the model, in bf16 on a GPU and in fp32 on the CPU."""
    disable_progress_bar()
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model: Any = AutoModelForCausalLM.from_pretrained(path, attn_implementation=entmaxkv.hf.NAME, dtype=dtype)
    model.to(device)
    if device == "cuda" and model.config.entmax_alpha != 1 and find_spec("adasplash"):
        fix_launches()
    loaded: PreTrainedModel = model
    return loaded


class Decoded(NamedTuple):
    """Decode steps after one context.

    Attributes:
        bits: [rows, steps] fp32, the cost of the next byte in bits.
        argmax: [rows, steps] int64, the byte that the model expects next.
    """

    bits: Tensor
    argmax: Tensor


class Context:
    """A model that has read the tokens `read` [rows, tokens] int64, and can decode after them again and again.

    The tokens must fill whole pages. Decoded tokens are then in other pages, and resetting the lengths removes them.
    """

    def __init__(self, model: PreTrainedModel, read: Tensor, room: int):
        self.model = model
        self.rows, self.tokens = read.shape
        self.cache = entmaxkv.hf.EntmaxCache(model.config, self.tokens + room, batch=self.rows)
        self.layers = self.cache.paged_layers
        if self.tokens % self.layers[0].page_size:
            raise ValueError(f"expected a context of whole pages of {self.layers[0].page_size}, got {self.tokens}")
        with torch.no_grad():
            model(input_ids=read, **with_cache(model, self.cache), attention_mask=UNMASKED, logits_to_keep=1)

    def rewind(self, select: Selector | None) -> None:
        """Removes the decoded tokens from the cache, and decodes with this selector from now on."""
        for layer in self.layers:
            layer.seen = self.tokens
            layer.paged.seq_lens.fill_(self.tokens)
        self.cache.select = select

    def step(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Logits [rows, vocabulary] after ids [rows, 1] at positions [1, 1]."""
        inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": UNMASKED}
        logits: Tensor = self.model(**inputs, **with_cache(self.model, self.cache)).logits
        return logits[:, -1]


class Stepper:
    """Decodes after a context with one selector; on a GPU by replays of a CUDA graph, unless `eager`.

    Attributes:
        ids: [rows, 1] int64, the step's input.
        positions: [1, 1] int64, the step's position; `step` adds 1 to it.
        logits: [rows, vocabulary] of the last step.
    """

    @torch.no_grad()
    def __init__(self, context: Context, select: Selector | None, *, eager: bool = False):
        self.context, self.select = context, select
        device = context.model.device
        self.ids = torch.zeros((context.rows, 1), dtype=torch.int64, device=device)
        self.positions = torch.zeros((1, 1), dtype=torch.int64, device=device)
        self.graph = None
        if device.type == "cuda" and not eager:
            self.rewind()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    context.step(self.ids, self.positions)
            torch.cuda.current_stream().wait_stream(stream)
            self.rewind()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.logits = context.step(self.ids, self.positions)
                self.positions += 1
        self.rewind()

    def rewind(self) -> None:
        """Goes back to the end of the context."""
        self.context.rewind(self.select)
        self.positions.fill_(self.context.tokens)

    @torch.no_grad()
    def step(self) -> None:
        if self.graph:
            self.graph.replay()
        else:
            self.logits = self.context.step(self.ids, self.positions)
            self.positions += 1

    def read(self, text: Tensor) -> Decoded:
        """Decodes text [rows, steps + 1] int64 byte by byte, and compares each prediction with the next byte."""
        self.rewind()
        bits, argmax = [], []
        for i in range(text.shape[1] - 1):
            self.ids.copy_(text[:, i : i + 1])
            self.step()
            logits = self.logits.float()
            surprise = -logits.log_softmax(-1).gather(1, text[:, i + 1 : i + 2])[:, 0]
            bits.append(surprise / math.log(2))
            argmax.append(logits.argmax(-1))
        return Decoded(torch.stack(bits, dim=1), torch.stack(argmax, dim=1))

    def write(self, first: Tensor, steps: int) -> Tensor:
        """The greedy continuation [rows, steps] after the bytes `first` [rows, 1] int64."""
        self.rewind()
        self.ids.copy_(first)
        written = []
        for _ in range(steps):
            self.step()
            self.ids.copy_(self.logits.argmax(-1, keepdim=True))
            written.append(self.ids.clone())
        return torch.cat(written, dim=1)
