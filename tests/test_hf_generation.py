"""Every way that transformers generates text, by EntmaxCache and by the default cache over the oracle's attention."""

import copy
import importlib

import pytest
import torch

import entmaxkv

pytest.importorskip("transformers")
hf = importlib.import_module("entmaxkv.hf")
from entmax_lm import ORACLE, TEXT, ids, load  # noqa: E402

TOKENS = 12
# Selectors that lose nothing, so that the text is the oracle's.
SELECTORS = [
    None,
    entmaxkv.KeySketch(dense_below=0),
    entmaxkv.TopPages(4096, dense_below=0),
    entmaxkv.Gaussian(margin=float("inf"), dense_below=0),
]
PROMPTS = {"one": (TEXT[:90],), "padded": (TEXT[:90], TEXT[300:340])}
# The options of `generate`, and the prompts that it takes with them.
MODES = {
    "greedy": ({}, "padded"),
    "beams": ({"num_beams": 3}, "padded"),
    "sampled beams": ({"num_beams": 2, "do_sample": True, "num_return_sequences": 2}, "padded"),
    "several sequences": ({"do_sample": True, "num_return_sequences": 3}, "padded"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 4}, "one"),
    "assistant": ({"assistant": True}, "one"),
}


@pytest.fixture(scope="module")
def models():
    return load(), load(ORACLE)


def generate(model, mode, cache=None):
    options, prompts = MODES[mode]
    options = {"do_sample": False, **options}
    if options.pop("assistant", False):
        options["assistant_model"] = shallow(model)
    rows, mask = ids(*PROMPTS[prompts])
    if cache is not None:
        options["past_key_values"] = cache
    torch.manual_seed(0)
    return model.generate(rows, attention_mask=mask, max_new_tokens=TOKENS, eos_token_id=None, **options)


def shallow(model):
    """A worse model to guess ahead: some guesses are right and some are not."""
    assistant = copy.deepcopy(model)
    assistant.model.layers = assistant.model.layers[:4]
    assistant.config.num_hidden_layers, assistant.config.layer_types = 4, assistant.config.layer_types[:4]
    return assistant


@pytest.fixture(scope="module")
def expected(models):
    texts = {}

    def of(mode):
        if mode not in texts:
            texts[mode] = generate(models[1], mode)
        return texts[mode]

    return of


@pytest.mark.parametrize("select", SELECTORS, ids=lambda select: type(select).__name__ if select else "dense")
@pytest.mark.parametrize("mode", MODES)
def test_text_is_that_of_the_default_cache(models, expected, mode, select):
    cache = hf.EntmaxCache(models[0].config, 128, select=select)
    assert torch.equal(generate(models[0], mode, cache), expected(mode))


@pytest.mark.parametrize("select", SELECTORS, ids=lambda select: type(select).__name__ if select else "dense")
@pytest.mark.parametrize("prompts", PROMPTS)
def test_crop_and_continue(models, prompts, select):
    """Generate, take back the newest tokens, read others, and generate again."""
    rows, mask = ids(*PROMPTS[prompts])
    options = {"max_new_tokens": TOKENS, "eos_token_id": None, "do_sample": False}
    texts = []
    for model, cache in ((models[0], hf.EntmaxCache(models[0].config, 160, select=select)), (models[1], None)):
        first = model.generate(rows, attention_mask=mask, past_key_values=cache, **options)
        if cache is not None:
            assert cache.get_seq_length() == rows.shape[1] + TOKENS - 1
            cache.crop(-7)
        kept = first[:, : rows.shape[1] + TOKENS - 1 - 7]  # the newest token was never read
        again = torch.cat([kept, torch.full((len(rows), 5), 10)], dim=1)
        ones = torch.cat([mask, mask.new_ones(len(rows), again.shape[1] - mask.shape[1])], dim=1)
        texts.append(model.generate(again, attention_mask=ones, past_key_values=cache, **options))
    assert torch.equal(*texts)


@torch.no_grad()
def test_rows_are_repeated_selected_and_cropped(models, device):
    """As searches do it that try several continuations, with padding, before and after the first token."""
    model, oracle = (copy.deepcopy(model).to(device) for model in models)
    rows, mask = (x.to(device) for x in ids(TEXT[:40], TEXT[100:125]))
    cache = hf.EntmaxCache(model.config, 64, select=entmaxkv.KeySketch(dense_below=0))
    cache.batch_repeat_interleave(2)  # nothing to repeat yet
    position = (mask.cumsum(1) - 1).clamp(min=0)
    model(input_ids=rows[:, :1], attention_mask=mask[:, :1], position_ids=position[:, :1], past_key_values=cache)
    model(input_ids=rows[:, 1:], attention_mask=mask, position_ids=position[:, 1:], past_key_values=cache)
    longer = torch.cat([mask, mask.new_ones(2, 3)], dim=1)
    wrong = {"input_ids": rows[:, :3], "attention_mask": longer, "position_ids": position[:, :3]}
    model(**wrong, past_key_values=cache)
    cache.crop(-3)
    cache.batch_repeat_interleave(3)
    cache.batch_select_indices(torch.tensor([4, 0]))
    cache.reorder_cache(torch.tensor([1, 0, 0]))
    new = torch.tensor([[10], [20], [30]], device=device)
    owner = torch.tensor([0, 1, 1], device=device)
    mask = torch.cat([mask[owner], mask.new_ones(3, 1)], dim=1)
    step = {"attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1}
    got = model(input_ids=new, past_key_values=cache, **step).logits
    rows = torch.cat([rows[owner], new], dim=1)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    want = oracle(input_ids=rows, attention_mask=mask, position_ids=position, use_cache=False).logits[:, -1:]
    torch.testing.assert_close(got, want, atol=2e-4, rtol=2e-4)
    assert cache.layers[0].paged.seq_lens.tolist() == [41, 26, 26]
