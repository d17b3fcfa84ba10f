"""Writes the model card of a model that train.py has trained."""

from typing import Any

CARD = """\
---
license: apache-2.0
library_name: transformers
---

# {name}

A byte-level language model with {kind} in every layer. It continues Python source.

| | |
|---|---|
| held-out bits per byte | **{bits:.3f}** at context {context} |
| parameters | {parameters:,}, {megabytes_of_weights:.2f} MB in bf16 |
| architecture | {architecture} |
| tokens | bytes: token id = byte value; 0 separates documents |

{loading_text}## Data

The standard library of Python {python}: {files} files, {megabytes:.1f} MB for training.{packages_text}
Held out: {test_files} files of the standard library, {test_megabytes:.2f} MB, chosen by a hash of the relative path
(`examples/train/corpus.py`), so that the same files are held out under every Python version. The figure above
is the mean over consecutive windows of {context} bytes of the held-out files, joined; each window is
read without what came before it. It was computed on the training machine, with the bf16 weights and with {kernels}.
The library repeats itself: some held-out files, such as code pages and test suites, have near relatives among the
training files. Without `encodings/` and `test/`, on the other {distant_megabytes:.2f} MB, it is **{distant_bits:.3f}**.
{facts_text}
The training text's SHA-256 is `{text}`.

## Training

    {command}

One {gpu}, torch {torch}, {minutes:.1f} minutes: {steps} steps of {batch} bytes, {seen:.0f} MB in all
({passes:.1f} passes over the data), {short_share:.0%} of them at context {short}, then {context}.{skips_text}
Muon for the matrices, AdamW for the rest, bf16 autocast. The curve is in `training.json`.

## Limits

It knows little but Python source. No instruction following, no safety training. It was trained on windows of at most
{context} bytes.

## Licence

Apache-2.0. The standard library is under the PSF licence, packages under theirs.
"""

LOADING = """\
## Loading

    import entmaxkv.hf  # registers the attention implementation that config.json names
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("{name}")
    cache = entmaxkv.hf.EntmaxCache(model.config, max_tokens={context}, select=entmaxkv.KeySketch())

Without `import entmaxkv.hf` loading fails: the model was not trained with softmax, which transformers would use.

"""


def card(about: dict[str, Any], machine: dict[str, str]) -> str:
    """The model card, from the facts that train.py writes to training.json."""
    entmax = about["attention"] == "entmax"
    layers = range(1, about["layers"] + 1)
    *most, last = [str(layer) for layer in layers if layer % about["nope_every"] == 0]
    architecture = (
        f"SmolLM3: {about['layers']} layers, width {about['width']}, {about['heads']} query and {about['kv_heads']} KV "
        f"heads of 64; layers {', '.join(most)} and {last} without RoPE"
    )
    packages_text = facts_text = skips_text = ""
    if about["packages"]:
        packages_text = (
            "\nBeside it, source and documentation of the packages installed on the training machine: "
            f"{about['package_files']} files, {about['package_megabytes']:.0f} MB, without {about['package_copies']} "
            "that repeat parts of a held-out file."
        )
    if about["facts"]:
        facts_text = (
            f"\nIn {about['facts']:.0%} of the windows key-value lines stand over the text, each twice "
            "(`examples/train/tasks.py`); of the bytes that can be known\nfrom the first time, the model takes "
            f"{about['recalled']:.1%} for the likeliest in held-out text.\n"
        )
    if about["positions"] > about["context"]:
        skips_text = f"\nHalf of the long windows skip positions (PoSE), up to {about['positions']}."
    command = "python examples/train/train.py {recipe} --attention {attention} --steps {steps} --batch {batch} "
    seen = about["steps"] * about["batch"] / 1e6
    return CARD.format(
        **about,
        **machine,
        kind="entmax attention (alpha 1.5)" if entmax else "softmax attention",
        kernels="AdaSplash" if entmax else "PyTorch's attention",
        architecture=architecture,
        loading_text=LOADING.format(**about) if entmax else "",
        megabytes_of_weights=about["size"] / 1e6,
        packages_text=packages_text,
        facts_text=facts_text,
        skips_text=skips_text,
        command=(command + "--learning-rate {learning_rate:g} --seed {seed}").format(**about),
        seen=seen,
        passes=seen / (about["megabytes"] + about["package_megabytes"]),
    )
