"""A sample of the sweep over transformers' architectures; `python tests/architectures.py` runs them all."""

import pytest

pytest.importorskip("transformers")
import architectures
import torch
import transformers
from architectures import KINDS, MODEL_TYPES, NOT_TRIED, PAGE, Case, committed, sweep
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

# One model for each way in which models attend, mask, cache or refuse.
SAMPLE = [
    "llama",
    "gpt2",  # Conv1D weights, heads that are no groups
    "bert",  # a decoder made of an encoder
    "bart",  # the decoder of an encoder-decoder, whose cross attention asks for a bidirectional mask
    "opt",
    "phimoe",
    "qwen2_moe",  # asks for a mask of windows that no layer has
    "hrm_text",  # calls a layer several times, each with another layer of the cache
    "gemma3_text",  # windows in some layers
    "gemma3n_text",  # layers that read the keys of an earlier one
    "gemma4_text",  # full layers with another head_dim
    "llama4_text",  # chunks in some layers
    "afmoe",  # needs a contiguous result
    "qwen3_next",  # linear attention in some layers
    "lfm3",  # convolutions and windows
    "nemotron_h",  # layers without a cache
    "zamba2",  # layers with both recurrence and attention
    "mistral",  # windows in every layer
    "moshi",  # a causal mask over a cache of windows
    "mamba",  # no attention
    "deepseek_v3",  # latent keys, expanded after the cache
    "jetmoe",  # keys repeated after the cache
    "diffllama",  # keys read twice
    "dory",  # adds layers to its cache
    "mllama",  # cross attention layers without images
    "deepseek_v32",  # sparse attention by an indexer
    "minimax_m3_vl_text",
    "doge",  # a learned mask
    "gemma2",  # a soft cap
    "gpt_oss",  # sinks
    "inkling_text",  # a position bias
    "bloom",  # attention code of its own
    "openai-gpt",  # asks for no mask either
    "git",  # knows its own attention only
]


@pytest.fixture(autouse=True)
def quiet_and_alone():
    """No warnings of transformers, and one thread: more of them only wait for each other on models this small."""
    level, threads = transformers.logging.get_verbosity(), torch.get_num_threads()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    yield
    transformers.logging.set_verbosity(level)
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", SAMPLE)
def test_equals_eager_or_says_why_not(model_type):
    outcome = sweep(model_type)
    assert not outcome.faults
    assert outcome.kind != NOT_TRIED
    text = PAGE.read_text()
    if f"transformers {transformers.__version__}," in text:
        assert committed(text)[model_type] == outcome.kind


def test_page_names_every_model_type_and_no_fault():
    text = PAGE.read_text()
    kinds = committed(text)
    assert KINDS[-1] not in kinds.values()
    if f"transformers {transformers.__version__}," in text:
        assert sorted(kinds) == sorted(MODEL_TYPES)
    assert sum(kind != NOT_TRIED for kind in kinds.values()) >= 60


@pytest.mark.filterwarnings("ignore")
def test_sweep_sees_an_attention_that_misses_one_key(monkeypatch):
    mappings = AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping
    monkeypatch.setitem(mappings[0], "entmaxkv", architectures.blind_attention)
    monkeypatch.setitem(mappings[1], "entmaxkv", eager_mask)
    faults = sweep("llama").faults
    assert {fault.split(":")[0] for fault in faults} >= {"DynamicCache, prefill", "DynamicCache, chunks"}


def test_case_leaves_padding_out():
    case = Case(torch.ones(2, 3, dtype=torch.long), (3,), torch.tensor([[0, 1, 1], [1, 1, 1]]))

    class Model(torch.nn.Module):
        def forward(self, input_ids, attention_mask, use_cache):
            return transformers.modeling_outputs.CausalLMOutput(logits=attention_mask[..., None].float())

    assert case.logits(Model(), None).tolist() == [[1.0]] * 5
