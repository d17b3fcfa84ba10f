"""Models with windows or chunks in some layers: those run in transformers' own cache, full layers in pages."""

import importlib

import pytest
import torch

import entmaxkv

pytest.importorskip("transformers")
hf = importlib.import_module("entmaxkv.hf")
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache  # noqa: E402

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 96,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HALF = ["sliding_attention", "full_attention"] * 2
MODELS = {
    "gemma3_text": {"sliding_window": 8, "layer_types": HALF, "query_pre_attn_scalar": 4},
    "qwen3": {"sliding_window": 8, "layer_types": HALF, "use_sliding_window": True},
    "llama4_text": {
        "layer_types": ["chunked_attention", "full_attention"] * 2,
        "attention_chunk_size": 8,
        "intermediate_size_mlp": 64,
        "num_local_experts": 2,
        "attn_temperature_tuning": False,
    },
}
PROMPT = torch.randint(3, 96, (2, 21), generator=torch.Generator().manual_seed(1))
PADDED = torch.ones(2, 21, dtype=torch.long)
PADDED[1, :6] = 0


@pytest.fixture(scope="module", params=MODELS)
def models(request):
    """The same weights under entmaxkv at alpha 1 and under eager, sharp enough that old keys matter."""
    config = AutoConfig.for_model(request.param, **{**SIZES, **MODELS[request.param]})
    config.entmax_alpha = 1.0
    torch.manual_seed(0)
    eager = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, parameter in eager.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")):
            parameter.data *= 8
    ours = AutoModelForCausalLM.from_config(config, attn_implementation=hf.NAME).eval()
    ours.load_state_dict(eager.state_dict())
    return ours, eager


def cache_of(model, **options):
    return hf.EntmaxCache(model.config, 64, **options)


@torch.no_grad()
@pytest.mark.parametrize("mask", [None, PADDED], ids=["whole", "padded"])
def test_prefill_chunks_and_decode_equal_eager(models, mask):
    ours, eager = models
    caches = cache_of(ours), DynamicCache(config=eager.config)
    assert [isinstance(layer, hf.EntmaxLayer) for layer in caches[0].layers] == [False, True, False, True]
    position = torch.arange(21).expand(2, 21) if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    real = torch.ones(2, 21, dtype=torch.bool) if mask is None else mask.bool()
    got, want = [], []
    for first, last in ((0, 7), (7, 8), (8, 17), (17, 18), (18, 21)):
        step = {"input_ids": PROMPT[:, first:last], "position_ids": position[:, first:last]}
        step["attention_mask"] = None if mask is None else mask[:, :last]
        for model, cache, logits in zip((ours, eager), caches, (got, want), strict=True):
            logits.append(model(**step, past_key_values=cache).logits)
    got, want = torch.cat(got, dim=1)[real], torch.cat(want, dim=1)[real]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    short = eager(input_ids=PROMPT[:, 12:], use_cache=False).logits[0, -1]
    assert (short - want.view(-1, 96)[-1 if mask is None else 20]).abs().max() > 1e-2  # old keys matter


@pytest.mark.parametrize("select", [None, entmaxkv.KeySketch(max_tokens=64, dense_below=0)], ids=["dense", "KeySketch"])
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=["greedy", "beams", "lookup"]
)
def test_generated_text_is_that_of_eager(models, options, select):
    ours, eager = models
    rows, mask = (PROMPT[:1], None) if "prompt_lookup_num_tokens" in options else (PROMPT, PADDED)
    options = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False, "eos_token_id": None, **options}
    texts = [
        model.generate(rows, past_key_values=cache, **options)
        for model, cache in ((ours, cache_of(ours, select=select)), (eager, None))
    ]
    assert torch.equal(*texts)


@torch.no_grad()
def test_entmax_has_no_windows_that_keys_leave(models):
    """transformers' own attention is softmax."""
    ours, _ = models
    with pytest.raises(ValueError, match=r"where alpha is 1.5, got windows of 8 tokens; max_tokens=8 would never"):
        cache_of(ours, alpha=1.5)
    short = hf.EntmaxCache(ours.config, 8, alpha=1.5)
    assert len(short.paged_layers) == 4
    ours(input_ids=PROMPT[:, :8], past_key_values=short)
    ours.config.entmax_alpha = 1.5
    try:
        with pytest.raises(ValueError, match=r"got (a sliding window of 8|attention in chunks of 8) tokens"):
            ours(input_ids=PROMPT, use_cache=False)
    finally:
        ours.config.entmax_alpha = 1.0


@torch.no_grad()
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_an_interrupted_step(models, layer):
    """Windows cannot be put back: the message asks for reset alone."""
    ours, _ = models
    cache = cache_of(ours)
    ours(input_ids=PROMPT[:, :12], past_key_values=cache)

    def interrupt(*args):
        raise KeyboardInterrupt

    hook = ours.model.layers[layer].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        ours(input_ids=PROMPT[:, 12:13], past_key_values=cache)
    hook.remove()
    with pytest.raises(RuntimeError, match=r"got layers of 12 to 13 tokens: it was interrupted; reset\(\) mends it"):
        ours(input_ids=PROMPT[:, 12:13], past_key_values=cache)
    cache.reset()
    ours(input_ids=PROMPT[:, :12], past_key_values=cache)


@torch.no_grad()
def test_windows_that_are_full_are_not_cropped_in_part(models):
    ours, _ = models
    cache = cache_of(ours)
    ours(input_ids=PROMPT[:, :12], past_key_values=cache)
    with pytest.raises(RuntimeError, match="expected to crop no window that is full, got 12 tokens to be cropped to 9"):
        cache.crop(-3)
    assert [layer.get_seq_length() for layer in cache.layers] == [12] * 4
    cache.activate_past_recording()
    ours(input_ids=PROMPT[:, 12:15], past_key_values=cache)
    cache.crop(-3)
    assert [layer.get_seq_length() for layer in cache.layers] == [12] * 4


@torch.no_grad()
def test_one_alpha_for_pages_and_windows(models):
    """Layers in transformers' own cache run by the config's."""
    ours, _ = models
    ours.config.entmax_alpha = 1.5
    try:
        with pytest.raises(ValueError, match=r"expected alpha = 1.5, by which the config has the layers in"):
            cache_of(ours, alpha=1.0)
    finally:
        ours.config.entmax_alpha = 1.0


@torch.no_grad()
def test_a_dynamic_cache_that_knows_no_windows(models):
    """It keeps all keys, and a mask hides the old ones."""
    ours, eager = models
    caches = DynamicCache(), DynamicCache()
    for first, last in ((0, 12), (12, 13), (13, 15), (15, 16)):
        got, want = (
            model(input_ids=PROMPT[:, first:last], past_key_values=cache).logits
            for model, cache in zip((ours, eager), caches, strict=True)
        )
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("held", [0, 9])
def test_an_interrupted_step_of_linear_attention(layer, held):
    """Layers of linear attention have no length to tell by."""
    sizes = {name: value for name, value in SIZES.items() if name != "intermediate_size"}
    linear = dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8)
    linear |= dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2)
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "intermediate_size": 32}
    config = AutoConfig.for_model("qwen3_next", **sizes, **linear, **experts, shared_expert_intermediate_size=16)
    config.entmax_alpha = 1.0
    model = AutoModelForCausalLM.from_config(config, attn_implementation=hf.NAME).eval()
    cache = cache_of(model)
    for part in (PROMPT[:, :8], PROMPT[:, 8:9]) if held else ():
        model(input_ids=part, past_key_values=cache)

    def interrupt(*args):
        raise KeyboardInterrupt

    hook = model.model.layers[layer].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(input_ids=PROMPT[:, 9:12], past_key_values=cache)
    hook.remove()
    with pytest.raises(RuntimeError, match="expected all layers to have done the last step"):
        model(input_ids=PROMPT[:, 9:12], past_key_values=cache)
