"""The transformers integration, on the model that ships."""

import copy
import importlib
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import CUDA

import entmaxkv

pytest.importorskip("transformers")
hf = importlib.import_module("entmaxkv.hf")
from entmax_lm import MODEL, ORACLE, ROOT, TEXT, close, ids, load  # noqa: E402
from transformers import AutoTokenizer, DynamicCache  # noqa: E402


@pytest.fixture(scope="module")
def model():
    return load()


@pytest.fixture(scope="module")
def dense_model():
    return load(ORACLE)


def test_model_ships(model):
    assert (MODEL / "model.safetensors").stat().st_size <= 8_000_000
    assert model.config.entmax_alpha == 1.5
    assert 0 < sum(model.config.no_rope_layers) < model.config.num_hidden_layers
    text = "naïve\n\tĀ \x00 'Ġ' ∂x\r\n"
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text


@torch.no_grad()
def test_prefill_and_decode_equal_recomputation(model, dense_model):
    rows, _ = ids(TEXT[:300])
    expected = dense_model(input_ids=rows, use_cache=False).logits
    cache = hf.EntmaxCache(model.config, max_tokens=300)
    steps = (200, 90, *[1] * 10)
    got = [model(input_ids=chunk, past_key_values=cache).logits for chunk in rows.split(steps, dim=1)]
    close(torch.cat(got, dim=1), expected)
    assert cache.get_seq_length() == 300


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 7, 100], ids="chunk{}".format)
def test_any_chunking_of_prefill_fills_the_same_pages(model, chunk):
    rows, _ = ids(TEXT[:41])
    caches = [hf.EntmaxCache(model.config, max_tokens=64, select=entmaxkv.TopPages()) for _ in range(2)]
    model(input_ids=rows, past_key_values=caches[0])
    for part in rows.split(chunk, dim=1):
        model(input_ids=part, past_key_values=caches[1])
    first, second = (cache.layers[0].paged for cache in caches)
    assert first.seq_lens.tolist() == second.seq_lens.tolist() == [41]
    for a, b in zip(*([c.k_pages[:2], c.v_pages[:2], c.k_min[:2], c.k_max[:2]] for c in (first, second)), strict=True):
        close(a, b)


@torch.no_grad()
@pytest.mark.parametrize(
    "select",
    [
        None,
        entmaxkv.TopPages(budget=256, dense_below=0),
        entmaxkv.Gaussian(dense_below=0),
        entmaxkv.KeySketch(dense_below=0),
    ],
    ids=str,
)
@pytest.mark.parametrize("device", [CUDA])
def test_text_on_a_gpu_is_that_of_the_cpu(model, device, select):
    """Greedy continuation in fp32, the prompt through the ops too (AdaSplash has an arithmetic of its own)."""
    rows, _ = ids(TEXT[:600])
    texts = []
    for where in ("cpu", device):
        moved = copy.deepcopy(model).to(where)
        cache = hf.EntmaxCache(model.config, max_tokens=700, select=select)
        moved(input_ids=rows[:, :1].to(where), past_key_values=cache)  # a first chunk that AdaSplash does not take
        texts.append(moved.generate(rows.to(where), past_key_values=cache, max_new_tokens=64, do_sample=False).cpu())
    assert torch.equal(*texts)


@torch.no_grad()
def test_other_caches_equal_recomputation(model, dense_model):
    rows, _ = ids(TEXT[:60])
    expected = dense_model(input_ids=rows, use_cache=False).logits
    close(model(input_ids=rows, use_cache=False).logits, expected)
    cache = DynamicCache(config=model.config)
    got = [model(input_ids=chunk, past_key_values=cache).logits for chunk in rows.split((57, 1, 2), dim=1)]
    close(torch.cat(got, dim=1), expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["entmax", "dynamic"])
def test_padded_batch_equals_rows_alone(model, kind):
    texts = [TEXT[:50], TEXT[100:105], TEXT[200:233]]
    rows, mask = ids(*texts)
    cache = hf.EntmaxCache(model.config, 80, batch=3) if kind == "entmax" else DynamicCache(config=model.config)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=rows, attention_mask=mask, position_ids=position, past_key_values=cache).logits
    for _ in range(3):
        mask = torch.cat([mask, mask.new_ones(3, 1)], dim=1)
        step = {
            "attention_mask": mask,
            "position_ids": mask.sum(1, keepdim=True) - 1,
            "past_key_values": cache,
        }
        last = model(input_ids=torch.full((3, 1), 10), **step).logits
    for b, text in enumerate(texts):
        alone = model(input_ids=ids(text + b"\n\n\n")[0], use_cache=False).logits[0]
        close(logits[b, -len(text) :], alone[: len(text)])
        close(last[b, 0], alone[-1])
    if kind == "entmax":
        assert cache.layers[0].paged.seq_lens.tolist() == [len(text) + 3 for text in texts]


@torch.no_grad()
def test_padding_in_chunks_and_at_the_end(model):
    rows, mask = ids(TEXT[:30], TEXT[40:47])
    cache = hf.EntmaxCache(model.config, 40, batch=2)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    for i in range(0, 30, 10):
        part = {"input_ids": rows[:, i : i + 10], "position_ids": position[:, i : i + 10]}
        logits = model(**part, attention_mask=mask[:, : i + 10], past_key_values=cache).logits
    close(logits[1, -1], model(input_ids=rows[1:, -7:], use_cache=False).logits[0, -1])
    shifted = torch.cat([rows[1:, -7:], rows[1:, :23]], dim=1)
    ahead = torch.cat([mask[1:, -7:], mask[1:, :23]], dim=1)
    padded = model(input_ids=shifted, attention_mask=ahead, use_cache=False).logits[0, 6]
    close(padded, logits[1, -1])


def generate(model, rows, mask, tokens=24, **options):
    cache = hf.EntmaxCache(model.config, rows.shape[1] + tokens, batch=rows.shape[0], **options)
    out = model.generate(
        rows,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
    )
    return [bytes(row[rows.shape[1] :].tolist()) for row in out]


def test_generate_is_the_same_text_when_everything_is_selected(model):
    rows, mask = ids(TEXT[:400])
    dense = generate(model, rows, mask)
    assert len(dense[0]) == 24
    assert generate(model, rows, mask, select=entmaxkv.TopPages(budget=424)) == dense
    assert generate(model, rows, mask, select=entmaxkv.Gaussian(margin=float("inf"))) == dense
    assert generate(model, rows, mask, select=entmaxkv.KeySketch(dense_below=0)) == dense
    assert generate(model, rows, mask, page_size=64) == dense


def test_generate_in_a_padded_batch(model):
    texts = [TEXT[:200], TEXT[:90]]
    together = generate(model, *ids(*texts), select=entmaxkv.TopPages(budget=32))
    alone = [generate(model, *ids(text), select=entmaxkv.TopPages(budget=32))[0] for text in texts]
    assert together == alone


def test_demo_prints_its_table():
    pytest.importorskip("rich")
    command = [sys.executable, ROOT / "examples" / "generate.py", "--context", "300", "--tokens", "20"]
    options = ["--file", ROOT / "examples" / "train" / "corpus.py", "--budget", "320"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    run = subprocess.run([*command, *options], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    methods = r"dense|KeySketch\(\)|TopPages\(320\)|Gaussian\(\)"
    rows = re.findall(rf"^ *({methods})((?: +\S+){{7}}) +(\d+)/20 *$", run.stdout, re.MULTILINE)
    assert [row[0] for row in rows] == ["dense", "KeySketch()", "TopPages(320)", "Gaussian()"], run.stdout
    assert [row[2] for row in rows[:3]] == ["20", "20", "20"]
    assert [row[1].split()[-1] for row in rows[:3]] == ["100%", "100%", "100%"]


@pytest.mark.parametrize(
    "option, text",
    [
        ("--budget=0", "--budget >= 1, got 0"),
        ("--alpha=3", r"--alpha in \[1, 2\], got 3"),
        (f"--file={os.devnull}", "a file that is not empty, got"),
        ("--model=absent", "a folder with a config.json, got absent"),
    ],
)
def test_demo_checks_its_options(option, text):
    pytest.importorskip("rich")
    run = subprocess.run([sys.executable, ROOT / "examples" / "generate.py", option], capture_output=True, text=True)
    assert run.returncode == 2 and re.search(text, " ".join(run.stderr.split())), run.stderr


@torch.no_grad()
def test_selector_reads_less(model):
    rows, _ = ids(TEXT[:400])
    cache = hf.EntmaxCache(model.config, 402)
    model(input_ids=rows, past_key_values=cache)
    dense, sparse = copy.deepcopy(cache), copy.deepcopy(cache)
    sparse.select = entmaxkv.TopPages(budget=16)
    one = torch.tensor([[10]])
    logits = [model(input_ids=one, past_key_values=c).logits for c in (dense, sparse)]
    assert not torch.equal(*logits)
    assert cache.get_seq_length() == 400 and dense.get_seq_length() == 401


@torch.no_grad()
def test_keeps_what_its_selectors_look_at(model):
    """And makes it of the tokens that are there when the selector changes."""
    rows, _ = ids(TEXT[:200])
    one = torch.tensor([[10]])
    kept = {"k_min": entmaxkv.TopPages(64), "k_mean": entmaxkv.Gaussian(), "codes": entmaxkv.KeySketch()}
    late = hf.EntmaxCache(model.config, 240)
    model(input_ids=rows, past_key_values=late)
    pages = late.layers[0].paged
    assert all(getattr(pages, name) is None for name in kept)
    for i, (name, select) in enumerate(kept.items()):
        late.select = select
        assert [getattr(pages, name) is not None for name in kept] == [j <= i for j in range(3)]
        own = hf.EntmaxCache(model.config, 240, select=select)
        model(input_ids=rows, past_key_values=own)
        assert [getattr(own.layers[0].paged, other) is not None for other in kept] == [other == name for other in kept]
        for _ in range(3):
            logits = [model(input_ids=one, past_key_values=copy.deepcopy(c)).logits for c in (late, own)]
            assert torch.equal(*logits)


@torch.no_grad()
@pytest.mark.parametrize("alpha", [1.0, 4 / 3, 2.0])
def test_alpha_comes_from_the_config(alpha):
    rows, _ = ids(TEXT[:80])
    model, dense_model = load(), load("sdpa" if alpha == 1 else ORACLE)
    model.config.entmax_alpha = dense_model.config.entmax_alpha = alpha
    close(model(input_ids=rows, use_cache=False).logits, dense_model(input_ids=rows, use_cache=False).logits)


def test_softmax_trains_as_pytorch_does():
    rows, _ = ids(TEXT[:60])
    gradients = []
    for implementation in (hf.NAME, "sdpa"):
        model = load(implementation)
        model.config.entmax_alpha = 1.0
        model(input_ids=rows, use_cache=False).logits.square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_softmax_prefill_whole_and_in_chunks_of_a_padded_batch():
    rows, mask = ids(TEXT[:60], TEXT[7:32])
    model = load()
    model.config.entmax_alpha = 1.0
    whole, chunked = (hf.EntmaxCache(model.config, 64, batch=2) for _ in range(2))
    want = model(input_ids=rows, attention_mask=mask, past_key_values=whole).logits
    got = [
        model(input_ids=part, attention_mask=mask[:, : 20 * (i + 1)], past_key_values=chunked).logits
        for i, part in enumerate(rows.split(20, dim=1))
    ]
    real = mask.bool()
    close(torch.cat(got, dim=1)[real], want[real])


@torch.no_grad()
def test_reset_empties_the_cache(model):
    rows, _ = ids(TEXT[:40])
    cache = hf.EntmaxCache(model.config, 40)
    first = model(input_ids=rows, past_key_values=cache).logits
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(model(input_ids=rows, past_key_values=cache).logits, first)
