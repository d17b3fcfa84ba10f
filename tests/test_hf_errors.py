"""What the transformers integration cannot do right raises, and says what it is; a failed call changes nothing."""

import copy
import importlib
import re
import subprocess
import sys
import types

import pytest
import torch
from torch import nn

import entmaxkv

pytest.importorskip("transformers")
hf = importlib.import_module("entmaxkv.hf")
from entmax_lm import MODEL, ORACLE, TEXT, close, ids, load  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM  # noqa: E402

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 64,
    "pad_token_id": 0,
}
# Models that compute their own softmax, whatever implementation they are given.
FOREIGN = {
    "bloom": {"hidden_size": 32, "n_layer": 1, "n_head": 2, "vocab_size": 64},
    "gpt_neox_japanese": {**TINY, "intermediate_multiple_size": 1},
    "megatron-bert": {**TINY, "is_decoder": True},
    "openai-gpt": {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 64},
    "rembert": {**TINY, "is_decoder": True, "input_embedding_size": 32, "output_embedding_size": 32},
    "roformer": {**TINY, "is_decoder": True},
    "trocr": {
        "d_model": 32,
        "decoder_layers": 1,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 32,
        "vocab_size": 64,
    },
    "xglm": {"d_model": 32, "num_layers": 1, "attention_heads": 2, "ffn_dim": 32, "vocab_size": 64},
    "git": TINY,
}


@pytest.fixture(scope="module")
def model():
    return load()


def tiny_llama(**attributes):
    config = LlamaConfig(**TINY)
    for name, value in attributes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=hf.NAME).eval()


def of_type(model_type, **options):
    """A tiny model of a type, with weights that make attention matter."""
    config = AutoConfig.for_model(model_type, **{**TINY, **options})
    config.entmax_alpha = 1.0
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=hf.NAME).eval()


@pytest.mark.parametrize("model_type", FOREIGN)
def test_models_with_a_softmax_of_their_own_are_refused_when_they_are_built(model_type):
    config = AutoConfig.for_model(model_type, **FOREIGN[model_type])
    with pytest.raises(ValueError, match=r"goes through transformers' AttentionInterface, got \w+, which computes"):
        AutoModelForCausalLM.from_config(config, attn_implementation=hf.NAME)


def test_models_with_a_softmax_of_their_own_are_refused_at_the_first_forward():
    """If somebody has given them the implementation behind transformers' back."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", **FOREIGN["bloom"]))
    model.config._attn_implementation = hf.NAME
    with torch.no_grad(), pytest.raises(ValueError, match="got Bloom"):
        model(input_ids=torch.ones(1, 4, dtype=torch.long))


def test_a_model_made_in_a_notebook_is_what_it_is_made_from():
    """Its class has no source to look at."""
    own = types.new_class("Own", (LlamaForCausalLM,), exec_body=lambda body: body.update(__module__="nowhere"))
    config = LlamaConfig(**TINY, attn_implementation=hf.NAME)
    config.entmax_alpha = 1.5
    own(config)


def test_alpha_must_be_stated():
    llama = tiny_llama()
    rows = torch.ones(1, 4, dtype=torch.long)
    with torch.no_grad(), pytest.raises(ValueError, match=r"expected a stated alpha, got a LlamaConfig without"):
        llama(input_ids=rows, use_cache=False)
    with pytest.raises(ValueError, match=r"expected a stated alpha, .* EntmaxCache\(..., alpha=...\)"):
        hf.EntmaxCache(llama.config, 16)
    with torch.no_grad():
        llama(input_ids=rows, past_key_values=hf.EntmaxCache(llama.config, 16, alpha=1.5))


@torch.no_grad()
def test_alpha_of_the_cache_comes_before_that_of_the_config(model):
    rows, _ = ids(TEXT[:40])
    softmax = load("sdpa")
    want = softmax(input_ids=rows, use_cache=False).logits
    cache = hf.EntmaxCache(model.config, 40, alpha=1.0)
    got = [model(input_ids=part, past_key_values=cache).logits for part in rows.split((30, 1, 9), dim=1)]
    close(torch.cat(got, dim=1), want)


def test_plain_loading_is_right_or_fails():
    """The shipped config names the implementation: whoever has not imported the module cannot get softmax unseen."""
    code = f"from transformers import AutoModelForCausalLM as Auto; Auto.from_pretrained({str(MODEL)!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1 and 'attn_implementation="entmaxkv"` is not supported' in run.stderr, run.stderr
    plain = AutoModelForCausalLM.from_pretrained(MODEL)
    assert plain.config._attn_implementation == hf.NAME and plain.config.architectures == [type(plain).__name__]


def test_saved_models_name_the_implementation(tmp_path):
    """Also of a model that was loaded from a config without it; softmax needs nothing of the kind."""
    for alpha, pinned in ((1.5, True), (1.0, False)):
        tiny_llama(entmax_alpha=alpha).save_pretrained(tmp_path)
        assert ('"attn_implementation": "entmaxkv"' in (tmp_path / "config.json").read_text()) == pinned


@torch.no_grad()
@pytest.mark.parametrize("kind", ["none", "dynamic", "entmax"])
def test_a_mask_longer_than_the_keys(model, kind):
    """Allocated ahead, or the whole mask given with chunks of a left-padded prompt: the first columns count."""
    rows, mask = ids(TEXT[:30], TEXT[40:57])
    position = (mask.cumsum(1) - 1).clamp(min=0)
    whole = model(input_ids=rows, attention_mask=mask, position_ids=position, use_cache=False).logits
    make = {"none": lambda: None, "dynamic": lambda: DynamicCache(config=model.config)}
    cache = make.get(kind, lambda: hf.EntmaxCache(model.config, 40))()
    ahead = torch.cat([mask, mask.new_zeros(2, 6)], dim=1)
    got = []
    for first, last in ((0, 30),) if cache is None else ((0, 11), (11, 23), (23, 24), (24, 30)):
        part = {"input_ids": rows[:, first:last], "position_ids": position[:, first:last]}
        got.append(model(**part, attention_mask=ahead, past_key_values=cache, use_cache=cache is not None).logits)
    real = mask.bool()
    close(torch.cat(got, dim=1)[real], whole[real])


def test_a_mask_that_changes_for_tokens_in_the_cache(model):
    rows, mask = ids(TEXT[:12])
    cache = hf.EntmaxCache(model.config, 16)
    changed = torch.cat([mask.masked_fill(torch.arange(12) < 3, 0), mask.new_ones(1, 1)], dim=1)
    with torch.no_grad():
        model(input_ids=rows, past_key_values=cache)
        with pytest.raises(ValueError, match="expected the attention_mask of the 12 tokens in the cache as it was"):
            model(input_ids=rows[:, :1], attention_mask=changed, past_key_values=cache)
    assert cache.get_seq_length() == 12


@torch.no_grad()
def test_keys_that_are_read_twice_are_appended_once(model):
    attention = model.model.layers[0].self_attn
    layer = hf.EntmaxCache(model.config, 16).layers[0]
    q, k, v = torch.randn(1, 4, 5, 64), torch.randn(1, 2, 5, 64), torch.randn(1, 2, 5, 64)
    key, value = layer.update(k, v)
    first, _ = hf.attention(attention, q, key, value, None)
    second, _ = hf.attention(attention, q, key, value, None)
    assert torch.equal(first, second)
    assert layer.paged.seq_lens.tolist() == [5] and layer.seen == 5
    for other in ((key, v), (k, value), (key, v + 1)):
        with pytest.raises(RuntimeError, match=r"expected the keys and values of one cache.update, got other"):
            hf.attention(attention, q, *other, None)
    layer.update(k, v)
    with pytest.raises(RuntimeError, match=r"expected the keys of the layer's last cache.update"):
        hf.attention(attention, q, key, value, None)


@pytest.mark.parametrize(
    "model_type, options",
    [("diffllama", {}), ("jetmoe", {"num_key_value_heads": 2, "kv_channels": 8, "num_local_experts": 2})],
    ids=["diffllama", "jetmoe"],
)
def test_models_that_change_keys_or_values_after_the_update(model_type, options):
    changing = of_type(model_type, **options)
    rows = torch.arange(1, 9)[None]
    with torch.no_grad():
        changing(input_ids=rows, past_key_values=DynamicCache(config=changing.config))
        with pytest.raises(RuntimeError, match=r"changes them after cache.update.* needs a DynamicCache"):
            changing(input_ids=rows, past_key_values=hf.EntmaxCache(changing.config, 16))


@torch.no_grad()
def test_another_implementation_over_a_filled_cache(model):
    """It would decode one token without its past."""
    cache, sdpa = hf.EntmaxCache(model.config, 16), load("sdpa")
    model(input_ids=ids(TEXT[:8])[0], past_key_values=cache)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"attn_implementation='entmaxkv', got another attention implementation"):
            sdpa(input_ids=ids(TEXT[8:9])[0], past_key_values=cache)
    oracle = load(ORACLE)(input_ids=ids(TEXT[:9])[0], use_cache=False).logits[:, -1:]
    close(model(input_ids=ids(TEXT[8:9])[0], past_key_values=cache).logits, oracle)


@torch.no_grad()
@pytest.mark.parametrize("held", [0, 20], ids=["prompt", "decode"])
def test_an_interrupted_step(model, held):
    """Ctrl-C in a middle layer: the next step says so, and crop makes the layers equal."""
    rows, _ = ids(TEXT[:24])
    cache = hf.EntmaxCache(model.config, 32, select=entmaxkv.TopPages(4096, dense_below=0))
    if held:
        model(input_ids=rows[:, :held], past_key_values=cache)
    step = {"input_ids": rows[:, held : held + 4], "past_key_values": cache}

    def interrupt(*args):
        raise KeyboardInterrupt

    hook = model.model.layers[3].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**step)
    hook.remove()
    text = rf"expected all layers to have done the last step, got layers of {held} to {held + 4} tokens"
    with pytest.raises(RuntimeError, match=text):
        model(**step)
    if held:
        cache.crop(held)
    else:
        cache.reset()
    assert [layer.seen for layer in cache.layers] == [held] * 6
    step["input_ids"] = rows[:, held:]
    want = load(ORACLE)(input_ids=rows, use_cache=False).logits[:, held:]
    close(model(**step).logits, want)


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 3, 5])
def test_a_step_that_is_interrupted_while_a_layer_appends(model, layer):
    """A signal is heard when the op returns: the pages hold the tokens, and nothing else knows of them."""
    rows, _ = ids(TEXT[:24])
    cache = hf.EntmaxCache(model.config, 32)
    model(input_ids=rows[:, :20], past_key_values=cache)
    append = cache.layers[layer].paged.append

    def interrupted(*args):
        append(*args)
        raise KeyboardInterrupt

    cache.layers[layer].paged.append = interrupted
    with pytest.raises(KeyboardInterrupt):
        model(input_ids=rows[:, 20:], past_key_values=cache)
    cache.layers[layer].paged.append = append
    with pytest.raises(RuntimeError, match="expected all layers to have done the last step"):
        model(input_ids=rows[:, 20:], past_key_values=cache)
    cache.crop(20)
    assert {each.paged.seq_lens.item() for each in cache.layers} == {20}
    want = load(ORACLE)(input_ids=rows, use_cache=False).logits[:, 20:]
    close(model(input_ids=rows[:, 20:], past_key_values=cache).logits, want)


@torch.no_grad()
@pytest.mark.parametrize(
    "mask",
    [torch.ones(1, 1, 1, 8), torch.ones(1, 1, 8, 8), torch.ones(1, 1, 8, 8).tril()],
    ids=["row", "full", "causal"],
)
def test_masks_of_the_user_in_four_dimensions(mask):
    """They are followed to the letter, also where they are not causal."""
    rows = torch.arange(1, 9)[None]
    ours, sdpa = tiny_llama(entmax_alpha=1.0), tiny_llama(entmax_alpha=1.0)
    sdpa.set_attn_implementation("sdpa")
    options = {"input_ids": rows, "attention_mask": mask.bool()}
    torch.testing.assert_close(ours(**options, use_cache=False).logits, sdpa(**options, use_cache=False).logits)
    with pytest.raises(ValueError, match="where the keys are in EntmaxCache, got a mask of its own"):
        ours(**options, past_key_values=hf.EntmaxCache(ours.config, 8))


def test_an_entmax_model_with_softmax_is_told(tmp_path):
    """And is saved with the implementation that it was trained with."""
    with pytest.warns(UserWarning, match=r"has entmax attention \(entmax_alpha 1.5\), but is built with .*'sdpa'"):
        model = AutoModelForCausalLM.from_pretrained(MODEL, attn_implementation="sdpa")
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == hf.NAME


def test_another_class_of_a_model_has_no_say():
    """A user's own model with attention of its own does not make the model that it is made from refused."""
    body = {"__module__": "elsewhere", "config_class": LlamaConfig}
    types.new_class("Elsewhere", (type(tiny_llama()),), exec_body=lambda space: space.update(body))
    llama = tiny_llama(entmax_alpha=1.5)
    with torch.no_grad():
        llama(input_ids=torch.ones(1, 4, dtype=torch.long), use_cache=False)


@torch.no_grad()
@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_a_compiled_model(alpha):
    llama = tiny_llama(entmax_alpha=alpha)
    rows = torch.arange(1, 9)[None]
    want = llama(input_ids=rows, use_cache=False).logits
    torch.testing.assert_close(torch.compile(llama, backend="eager")(input_ids=rows, use_cache=False).logits, want)


@torch.no_grad()
def test_an_emptied_cache_takes_other_rows_and_dtypes():
    llama = tiny_llama(entmax_alpha=1.5)
    cache = hf.EntmaxCache(llama.config, 16)
    rows, mask = torch.arange(1, 9).expand(2, 8), torch.ones(2, 8, dtype=torch.long)
    mask[1, :3] = 0
    llama.bfloat16()(input_ids=rows, attention_mask=mask, past_key_values=cache)
    cache.crop(-8)
    llama.float()
    want = llama(input_ids=rows[:1], use_cache=False).logits
    torch.testing.assert_close(llama(input_ids=rows[:1], past_key_values=cache).logits, want)
    assert cache.layers[0].paged.k_pages.dtype == torch.float32
    text = r"EntmaxCache\(2 of 2 layers in pages, 8 of 16 tokens, 1 rows, alpha=1.5, select=None, 0.0 MiB\)"
    assert re.fullmatch(text, repr(cache))


@pytest.mark.parametrize("alpha, tokens", [(1.5, 8), (1.5, 1), (1.0, 1), (1.0, 8)])
def test_gradients_of_keys_and_values_alone(alpha, tokens):
    """Where nothing computes them the call raises; they are never lost."""
    gradients = []
    for implementation in (hf.NAME, "sdpa"):
        llama = tiny_llama(entmax_alpha=alpha)
        llama.set_attn_implementation(implementation)
        llama.requires_grad_(False)
        for layer in llama.model.layers[:1]:
            layer.self_attn.k_proj.requires_grad_(True)
            layer.self_attn.v_proj.requires_grad_(True)
        rows = torch.arange(1, 1 + tokens)[None]
        if alpha != 1 and implementation == hf.NAME:
            with pytest.raises(RuntimeError, match="to train, expected AdaSplash"):
                llama(input_ids=rows, use_cache=False)
            return
        llama(input_ids=rows, use_cache=False).logits.square().sum().backward()
        attention = llama.model.layers[0].self_attn
        gradients.append([attention.k_proj.weight.grad, attention.v_proj.weight.grad])
    assert gradients[0][1].abs().max() > 0
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def with_dropout(model):
    model.train().requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1


def not_causal(model):
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.is_causal = False


def with_alpha_3(model):
    model.requires_grad_(False).config.entmax_alpha = 3.0


@pytest.mark.parametrize("spoil", [nn.Module.requires_grad_, with_dropout, not_causal, with_alpha_3])
def test_retry_after_a_failed_call(model, spoil):
    rows, cache = ids(TEXT[:40])[0], hf.EntmaxCache(model.config, 40)
    first, rest = rows.split((30, 10), dim=1)
    spoilt = load()
    spoil(spoilt)
    with torch.no_grad():
        expected = model(input_ids=rows, use_cache=False).logits
        model(input_ids=first, past_key_values=cache)
    with pytest.raises(ValueError, match="entmaxkv"):
        spoilt(input_ids=rest, past_key_values=cache)
    assert cache.get_seq_length() == 30 and cache.layers[0].paged.seq_lens.tolist() == [30]
    with torch.no_grad():
        close(model(input_ids=rest, past_key_values=cache).logits, expected[:, 30:])


def test_text_config_of_a_larger_model(model):
    config = types.SimpleNamespace(get_text_config=lambda decoder: model.config)
    assert len(hf.EntmaxCache(config, 16).layers) == model.config.num_hidden_layers


def full_cache(model):
    cache = hf.EntmaxCache(model.config, 5)
    with torch.no_grad():
        model(input_ids=ids(TEXT[:4])[0], past_key_values=cache)
        try:
            model(input_ids=ids(TEXT[:2])[0], past_key_values=cache)
        finally:
            assert cache.get_seq_length() == 4 and cache.layers[0].paged.seq_lens.tolist() == [4]


def old_transformers(model):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "transformers", types.ModuleType("transformers"))
        patch.delitem(sys.modules, "entmaxkv.hf")
        importlib.import_module("entmaxkv.hf")


def sliding_layers(model, count=6):
    config = copy.deepcopy(model.config)
    config.layer_types = ["sliding_attention"] * count + ["full_attention"] * (6 - count)
    config.sliding_window = 8
    assert len(hf.EntmaxCache(config, 8).paged_layers) == 6  # a window that is never left counts as full
    hf.EntmaxCache(config, 16)


def fewer_layers(model):
    config = copy.deepcopy(model.config)
    config.num_hidden_layers, config.layer_types = 2, config.layer_types[:2]
    with torch.no_grad():
        model(input_ids=ids(TEXT[:4])[0], past_key_values=hf.EntmaxCache(config, 16))


def linear_layers(model):
    hf.EntmaxCache(AutoConfig.for_model("mamba", num_hidden_layers=2), 16, alpha=1.0)


def static_cache(model):
    rows, mask = ids(TEXT[:40])
    model.generate(rows, attention_mask=mask, max_new_tokens=4, cache_implementation="static")


def alpha_3(model):
    config = copy.deepcopy(model.config)
    config.entmax_alpha = 3
    hf.EntmaxCache(config, 16)


def packed(model):
    with torch.no_grad():
        model(input_ids=ids(TEXT[:4])[0], position_ids=torch.tensor([[0, 1, 0, 1]]), use_cache=False)


def short_mask(model):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for _ in range(2):
            model(input_ids=ids(TEXT[:4])[0], attention_mask=torch.ones(1, 4), past_key_values=cache)


def call(model, dtype=torch.float32, **options):
    q, k = torch.zeros(1, 4, 8, 64, dtype=dtype), torch.zeros(1, 2, 8, 64, dtype=dtype)
    hf.attention(model.model.layers[0].self_attn, q, k, k, options.pop("attention_mask", None), **options)


ERRORS = {
    "full cache": (full_cache, ValueError, r"full: expected at most max_tokens = 5, got 4 and 2 more"),
    "batch": (
        lambda m: m(input_ids=ids(TEXT[:4], TEXT[:3])[0], past_key_values=hf.EntmaxCache(m.config, 16, batch=1)),
        ValueError,
        r"expected batch 1, got 2",
    ),
    "transformers 4": (old_transformers, ImportError, r"expected transformers >= 5.17"),
    "windows everywhere": (
        sliding_layers,
        ValueError,
        r"expected full attention in every layer where alpha is 1.5, got windows of 8 tokens; max_tokens=8 would",
    ),
    "windows and entmax": (
        lambda m: sliding_layers(m, 3),
        ValueError,
        r"expected full attention in every layer where alpha is 1.5, got windows of 8 tokens",
    ),
    "max_tokens": (
        lambda m: hf.EntmaxCache(m.config, "64"),
        ValueError,
        r"max_tokens: expected .* got '64'",
    ),
    "no tokens": (lambda m: hf.EntmaxCache(m.config, 0), ValueError, r"max_tokens: expected .* at least 1, got 0"),
    "rows": (lambda m: hf.EntmaxCache(m.config, 8, batch="2"), ValueError, r"batch: expected .* got '2'"),
    "pages": (lambda m: hf.EntmaxCache(m.config, 8, page_size=7), ValueError, r"page_size: expected 8, 16, .* got 7"),
    "dtype": (lambda m: hf.EntmaxCache(m.config, 8, dtype="bf16"), ValueError, r"dtype: expected .* got 'bf16'"),
    "selector": (
        lambda m: hf.EntmaxCache(m.config, 8, select=entmaxkv.KeySketch),
        ValueError,
        r"select: expected",
    ),
    "model": (
        lambda m: hf.EntmaxCache(m, 8),
        ValueError,
        r"config: expected .*, got a SmolLM3ForCausalLM",
    ),
    "fewer layers": (fewer_layers, ValueError, r"expected a model of 2 layers, got one of more"),
    "float64": (lambda m: call(m, dtype=torch.float64), ValueError, r"expected keys of float32, .* got torch.float64"),
    "linear attention": (linear_layers, ValueError, r"expected full attention in some layer, got .*use a DynamicCache"),
    "training on the CPU": (
        lambda m: m(input_ids=ids(TEXT[:4])[0], use_cache=False),
        RuntimeError,
        r"to train, expected AdaSplash, which needs a CUDA device, got cpu",
    ),
    "training with a cache": (
        lambda m: m(input_ids=ids(TEXT[:4])[0], past_key_values=hf.EntmaxCache(m.config, 16)),
        ValueError,
        r"expected no cache where gradients are recorded.* wrap the call in torch.no_grad\(\)",
    ),
    "static cache": (static_cache, ValueError, r"expected EntmaxCache or a dynamic cache.* got a static one"),
    "short mask": (short_mask, ValueError, r"expected an attention_mask of all 8 tokens, got 4"),
    "packed sequences": (packed, ValueError, r"that see every key up to their own where alpha is 1.5, got .*packed"),
    "alpha": (alpha_3, ValueError, r"expected config.entmax_alpha in \[1, 2\], got 3"),
    "4D mask": (
        lambda m: call(m, attention_mask=torch.zeros(1, 1, 8, 8)),
        ValueError,
        r"expected a bool attention_mask \[1, 1, 1 or 8, 8\] .*got torch.float32 of shape \(1, 1, 8, 8\)",
    ),
    "dropout": (lambda m: call(m, dropout=0.1), ValueError, r"expected no dropout, got 0.1"),
    "window": (lambda m: call(m, sliding_window=4), ValueError, r"got a sliding window of 4 tokens and older keys"),
    "not causal": (lambda m: call(m, is_causal=False), ValueError, r"expected causal attention, got is_causal=False"),
    "sinks": (lambda m: call(m, s_aux=torch.zeros(4)), ValueError, r"expected no s_aux .*got a tensor of shape \(4,\)"),
    "softcap": (lambda m: call(m, softcap=30.0), ValueError, r"expected no softcap \(a soft cap .*\), got 30"),
    "position bias": (
        lambda m: call(m, position_bias=torch.zeros(1, 4, 8, 8)),
        ValueError,
        r"expected no position_bias, got a tensor of shape \(1, 4, 8, 8\)",
    ),
    "other sinks": (lambda m: call(m, sinks=torch.zeros(4)), ValueError, r"expected no sinks \(attention sinks\), got"),
    "weights": (lambda m: call(m, output_attentions=True), ValueError, r"expected no output_attentions"),
    "packed lengths": (
        lambda m: call(m, cu_seq_lens_q=torch.ones(2)),
        ValueError,
        r"expected no cu_seq_lens_q \(packed",
    ),
}


@pytest.mark.parametrize("wrong, error, text", ERRORS.values(), ids=ERRORS)
def test_errors(model, wrong, error, text):
    with pytest.raises(error, match=text):
        wrong(model)
