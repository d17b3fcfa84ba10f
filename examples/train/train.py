"""Trains the example models: byte-level SmolLM3s with entmax-1.5 or softmax in every layer.

    pip install adasplash
    python examples/train/train.py stdlib  # the model that ships in examples/stdlib-entmax
    python examples/train/train.py twin --attention entmax --out runs/twin-entmax  # and the pair of docs/accuracy.md
    python examples/train/train.py twin --attention softmax --out runs/twin-softmax

It takes one CUDA GPU, and goes on where it was stopped: the checkpoint is in --out. What a step sees depends on --seed
and its number alone, so twins see the same.
"""

import argparse
import copy
import csv
import functools
import json
import math
import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from corpus import SEPARATOR, default_packages, default_source, files, held_out, package_texts
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from tasks import overlay
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast, SmolLM3Config

import entmaxkv.hf

SHIPPED = Path(__file__).parents[1] / "stdlib-entmax"
CONTEXT = 16384
# Held-out files in these folders have near relatives among the training files.
RELATED = ("encodings/", "test/")
WARMUP, DECAY = 0.02, 0.5  # shares of the steps
ALPHA = {"entmax": 1.5, "softmax": 1.0}
LOG_SECONDS, SAVE_SECONDS = 15, 60
TASK_WINDOWS = 4  # evaluated windows with facts in them


@dataclass(frozen=True)
class Recipe:
    """What is trained, on what, for how long.

    Attributes:
        width, inner, layers, heads, kv_heads: of the model, heads being of 64.
        no_rope: every so many layers, one has no position encoding.
        theta: of RoPE.
        positions: positions that RoPE is to know; beyond the context, half of the long windows skip some.
        steps: steps of `batch` bytes.
        contexts: (from this share of the steps on, context): short windows first, they are cheaper.
        rate: peak learning rate.
        packages: whether installed packages are read beside the standard library.
        facts: share of the windows with lines that come back, see tasks.py.
    """

    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    no_rope: int
    theta: float
    positions: int
    steps: int
    contexts: tuple[tuple[float, int], ...]
    rate: float
    packages: bool
    facts: float

    def configuration(self, alpha: float) -> SmolLM3Config:
        return SmolLM3Config(
            vocab_size=256,
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=64,
            no_rope_layers=[int((layer + 1) % self.no_rope != 0) for layer in range(self.layers)],
            rope_parameters={"rope_type": "default", "rope_theta": self.theta},
            max_position_embeddings=self.positions,
            tie_word_embeddings=True,
            pad_token_id=None,
            bos_token_id=0,
            eos_token_id=0,
            entmax_alpha=alpha,
        )


RECIPES = {
    "stdlib": Recipe(256, 576, 6, 4, 2, 3, 5e4, CONTEXT, 6810, ((0.0, 4096), (0.4, CONTEXT)), 4e-3, False, 0.0),
    "twin": Recipe(512, 1536, 8, 8, 2, 2, 5e5, 131072, 4800, ((0.0, 4096), (0.6, CONTEXT)), 3e-3, True, 0.3),
}


def fix_launches() -> None:
    """Spares AdaSplash its search over launch configurations, which costs minutes for every context.

    Of (warps, stages) in {2, 4} x {2, 3}, (4, 3) was the fastest on an H200: 10.9 ms for 4 x 16384 tokens of one layer
    of 4 heads, forward and backward, against 12.1 to 25.9.
    """
    import adasplash.adasplash_v2 as kernels
    import triton

    launch = {"num_warps": 4, "num_stages": 3}
    kernels._get_tau.configs = [triton.Config({"BLOCK_M": 64, "BLOCK_N": 64}, **launch)]
    for name in ("_get_tau_v2", "_get_tau_v3", "_get_output", "_bwd_q_kernel", "_bwd_kv_kernel"):
        getattr(kernels, name).configs = [triton.Config({}, **launch)]


def byte_tokenizer(context: int) -> PreTrainedTokenizerFast:
    """The tokenizer whose token ids are byte values; 0 separates documents."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    vocab = {letters[byte]: byte for byte in range(1, 256)} | {SEPARATOR.decode(): 0}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    separator = AddedToken(SEPARATOR.decode(), special=True, normalized=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=separator,
        pad_token=separator,
        padding_side="left",
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


class Windows:
    """Windows of shuffled, joined documents, each a function of its number: [context + 1] bytes."""

    def __init__(self, documents: list[bytes], facts: float, seed: int):
        order = np.random.default_rng(seed).permutation(len(documents))
        self.text = np.frombuffer(b"".join(documents[i] + SEPARATOR for i in order), np.uint8)
        self.facts, self.seed = facts, seed

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def _epoch(self, epoch: int, context: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, epoch, context))
        starts = np.arange(rng.integers(context), len(self.text) - context - 1, context)
        return rng.permutation(starts)[: len(self.text) // context - 2]

    def row(self, number: int, context: int) -> np.ndarray:
        epoch, at = divmod(number, len(self.text) // context - 2)
        start = self._epoch(epoch, context)[at]
        window = self.text[start : start + context + 1]
        rng = np.random.default_rng((self.seed, number))
        if rng.random() < self.facts:
            window = window.copy()
            overlay(window, rng)
        return window

    def batch(self, step: int, rows: int, context: int) -> Tensor:
        """[rows, context + 1] int64."""
        return torch.from_numpy(np.stack([self.row(step * rows + i, context) for i in range(rows)]).astype(np.int64))


def positions(step: int, context: int, most: int, seed: int) -> Tensor:
    """Positions [1, context] of a step's tokens; where there may be more than tokens, half of the steps skip some.

    So the model sees all distances that RoPE is to know, in windows that are cheap (PoSE, arXiv 2309.10400).
    """
    places = torch.arange(context)
    rng = np.random.default_rng((seed, step, 1))
    if context == CONTEXT < most and rng.random() < 0.5:
        places[rng.integers(1, context) :] += int(rng.integers(most - context))
    return places[None]


def logits(model: nn.Module, tokens: Tensor, places: Tensor | None = None) -> Tensor:
    """Of tokens[:, :-1], at these positions."""
    # A mask that transformers need not make: to find out that it is plainly causal would mean waiting for the device.
    inputs = {"input_ids": tokens[:, :-1], "position_ids": places, "attention_mask": {"full_attention": None}}
    with torch.autocast("cuda", torch.bfloat16):
        return model(**inputs, use_cache=False).logits.float()


def bits(found: Tensor, tokens: Tensor) -> Tensor:
    """Mean bits per byte of tokens[:, 1:] by these logits."""
    return nn.functional.cross_entropy(found.flatten(0, 1), tokens[:, 1:].flatten()) / math.log(2)


@torch.no_grad()
def evaluate(model: nn.Module, text: np.ndarray, windows: int | None = None) -> float:
    """Bits per byte over consecutive windows of CONTEXT bytes, each read without what came before it."""
    stop = (len(text) - 1) // CONTEXT if windows is None else windows
    rows = [text[i * CONTEXT : (i + 1) * CONTEXT + 1].astype(np.int64) for i in range(stop)]
    found = []
    for row in rows:
        tokens = torch.from_numpy(row)[None].cuda()
        found.append(bits(logits(model, tokens), tokens).item())
    return sum(found) / len(found)


@torch.no_grad()
def recalled(model: nn.Module, text: np.ndarray) -> float:
    """Share of the bytes of facts that come back which the model takes for the likeliest."""
    right = total = 0
    for i in range(TASK_WINDOWS):
        row = text[i * CONTEXT : (i + 1) * CONTEXT + 1].copy()
        answers = torch.from_numpy(overlay(row, np.random.default_rng(i))[1:]).cuda()
        tokens = torch.from_numpy(row.astype(np.int64))[None].cuda()
        hits = logits(model, tokens)[0].argmax(-1) == tokens[0, 1:]
        right, total = right + int((hits & answers).sum()), total + int(answers.sum())
    return right / total


def learning_rate(progress: float) -> float:
    """Share of the peak rate at this share of the steps: warm-up, plateau, linear decay to zero."""
    return max(0.0, min(1.0, progress / WARMUP, (1 - progress) / DECAY))


def save(model: nn.Module, out: Path) -> None:
    """Writes the model in bf16 with its configuration and tokenizer."""
    state = {name: x.detach().bfloat16().cpu().contiguous() for name, x in model.state_dict().items()}
    state.pop("lm_head.weight")
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    config = copy.deepcopy(model.config)
    config.dtype = torch.bfloat16
    config.save_pretrained(out)
    GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0).save_pretrained(out)
    byte_tokenizer(config.max_position_embeddings).save_pretrained(out)


class Run:
    """The state of a training run, in a checkpoint from time to time.

    Attributes:
        settings: What has to be the same to go on.
        step, seconds: Done so far.
        log: Rows of training.csv.
    """

    def __init__(self, out: Path, settings: dict[str, Any], model: nn.Module, optimizers: list[torch.optim.Optimizer]):
        self.path = out / "checkpoint.pt"
        self.settings, self.model, self.optimizers = settings, model, optimizers
        self.step, self.seconds = 0, 0.0
        self.log: list[dict[str, float]] = []
        if self.path.exists():
            state = torch.load(self.path, map_location="cuda", weights_only=True)
            if state["settings"] != settings:
                raise SystemExit(
                    f"expected the settings of {self.path}, {state['settings']}, got {settings}; "
                    "give another --out, or remove it to begin anew"
                )
            model.load_state_dict(state["model"])
            for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.step, self.seconds, self.log = state["step"], state["seconds"], state["log"]

    def save(self) -> None:
        state = {
            "settings": self.settings,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
            "log": self.log,
        }
        torch.save(state, self.path.with_suffix(".new"))
        os.replace(self.path.with_suffix(".new"), self.path)


def main() -> None:
    """Trains, evaluates on the held-out files, and writes the model with its card."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("recipe", choices=RECIPES, help="stdlib: 3.9M parameters; twin: 24M")
    parser.add_argument("--attention", choices=ALPHA, default="entmax", help="default entmax")
    parser.add_argument("--source", type=Path, default=default_source(), help="folder of the standard library")
    parser.add_argument("--packages", type=Path, default=default_packages(), help="folder of packages, for twin")
    parser.add_argument("--python", default=platform.python_version(), help="the version of that source")
    parser.add_argument("--out", type=Path, help="output folder (stdlib: default the one that ships)")
    parser.add_argument("--steps", type=int, help="default: the recipe's")
    parser.add_argument("--batch", type=int, default=65536, help="bytes per step (default 65536)")
    parser.add_argument("--rate", type=float, help="peak learning rate (default: the recipe's)")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--stop", type=int, help="leave off after this step, to go on later")
    args = parser.parse_args()
    recipe = RECIPES[args.recipe]
    out = args.out or (SHIPPED if args.recipe == "stdlib" else None)
    if out is None:
        parser.error("expected --out for twin, got none")
    if not torch.cuda.is_available():
        parser.error("expected a CUDA GPU, got none")
    steps, rate = args.steps or recipe.steps, args.rate or recipe.rate
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    torch.manual_seed(args.seed)
    if args.attention == "entmax":
        fix_launches()
    torch.set_float32_matmul_precision("high")

    corpus = {name: path.read_bytes() for name, path in files(args.source).items()}
    train = [text for name, text in corpus.items() if not held_out(name)]
    packages = package_texts(args.packages) if recipe.packages else []
    windows = Windows(train + packages, recipe.facts, args.seed)
    tests = {name: text + SEPARATOR for name, text in corpus.items() if held_out(name)}
    test = np.frombuffer(b"".join(tests.values()), np.uint8)
    distant = np.frombuffer(b"".join(text for name, text in tests.items() if not name.startswith(RELATED)), np.uint8)
    about: dict[str, Any] = {
        "python": args.python,
        "files": len(train),
        "megabytes": sum(map(len, train)) / 1e6,
        "package_files": len(packages),
        "package_megabytes": sum(map(len, packages)) / 1e6,
        "test_files": len(tests),
        "test_megabytes": len(test) / 1e6,
        "distant_megabytes": len(distant) / 1e6,
    }
    console.print(about)

    model = AutoModelForCausalLM.from_config(
        recipe.configuration(ALPHA[args.attention]), attn_implementation=entmaxkv.hf.NAME, dtype=torch.float32
    ).cuda()
    torch._dynamo.config.recompile_limit = 64
    for layer in model.model.layers:
        layer.compile(dynamic=False)
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    settings = {
        "recipe": args.recipe,
        "attention": args.attention,
        "steps": steps,
        "batch": args.batch,
        "rate": rate,
        "seed": args.seed,
        "bytes": len(windows.text),
    }
    run = Run(out, settings, model, optimizers)
    if run.step:
        console.print(f"going on after step {run.step}")

    losses: list[Tensor] = []
    before = run.seconds
    start = told = kept = time.perf_counter()
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("compiling", total=steps, completed=run.step)
        while run.step < min(steps, args.stop or steps):
            progress = run.step / steps
            context = [size for share, size in recipe.contexts if progress >= share][-1]
            tokens = windows.batch(run.step, args.batch // context, context).pin_memory().cuda(non_blocking=True)
            places = positions(run.step, context, recipe.positions, args.seed).pin_memory().cuda(non_blocking=True)
            loss = bits(logits(model, tokens, places), tokens)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate * learning_rate(progress)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            run.step += 1
            losses.append(loss.detach())
            if run.step % 10 == 0:
                losses[-1].item()  # keeps the host within ten steps of the device, so that the clock is true
                bar.update(task, completed=run.step, description=f"step {run.step}, context {context}")
            now = time.perf_counter()
            run.seconds = before + now - start
            if now - told > LOG_SECONDS or run.step == steps:
                entry = {
                    "seconds": round(run.seconds, 1),
                    "step": run.step,
                    "bytes": run.step * args.batch,
                    "context": context,
                    "train_bits": round(torch.stack(losses).mean().item(), 4),
                    "held_out_bits": round(evaluate(model, test, windows=4), 4),
                }
                if recipe.facts:
                    entry["recall"] = round(recalled(model, test), 4)
                console.print(json.dumps(entry), soft_wrap=True)
                run.log.append(entry)
                losses.clear()
                told = time.perf_counter()
            if now - kept > SAVE_SECONDS:
                run.save()
                kept = time.perf_counter()
    run.save()
    with (out / "training.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(run.log[0]) if run.log else [])
        writer.writeheader()
        writer.writerows(run.log)
    if run.step < steps:
        console.print(f"left off after step {run.step} of {steps}; the same command goes on")
        return

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    found = {"bits": evaluate(model, test), "distant_bits": evaluate(model, distant)}
    if recipe.facts:
        found["recall"] = recalled(model, test)
    console.print(found)
    save(model, out)
    parameters = sum(p.numel() for p in model.parameters())
    about |= {**settings, **found, "parameters": parameters, "minutes": run.seconds / 60}
    about |= {"machine": torch.cuda.get_device_name(), "torch": torch.__version__}
    (out / "training.json").write_text(json.dumps({**asdict(recipe), **about}, indent=1) + "\n")
    (out / "README.md").write_text(card(recipe, about, out))


def card(recipe: Recipe, about: dict[str, Any], out: Path) -> str:
    """The model card: what training.json says, in words."""
    name = "stdlib-entmax" if about["recipe"] == "stdlib" else f"{about['recipe']}-{about['attention']}"
    no_rope = [layer + 1 for layer in range(recipe.layers) if (layer + 1) % recipe.no_rope == 0]
    packages = ""
    if recipe.packages:
        packages = (
            f" Beside it, source and documentation of the packages installed on the training machine: "
            f"{about['package_files']} files, {about['package_megabytes']:.0f} MB."
        )
    tasks = ""
    if recipe.facts:
        tasks = (
            f" In {recipe.facts:.0%} of the windows lines stand over the text that come back once "
            f"(`examples/train/tasks.py`); of the bytes that can be known from the first time, the model takes "
            f"{about['recall']:.1%} for the likeliest in held-out text."
        )
    skips = ""
    if recipe.positions > CONTEXT:
        skips = f" Half of the long windows skip positions (PoSE), up to {recipe.positions}."
    architecture = (
        f"SmolLM3: {recipe.layers} layers, width {recipe.width}, "
        f"{recipe.heads} query and {recipe.kv_heads} KV heads of 64; layers {', '.join(map(str, no_rope[:-1]))} and {no_rope[-1]} without RoPE"
    )
    command = "python examples/train/train.py {recipe} --attention {attention} --steps {steps} --batch {batch} "
    command = (command + "--rate {rate:g} --seed {seed}").format(**about)
    attention = "entmax attention (alpha 1.5)" if about["attention"] == "entmax" else "softmax attention"
    return CARD.format(
        **about,
        name=name,
        kind=attention,
        size=(out / "model.safetensors").stat().st_size / 1e6,
        context=CONTEXT,
        contexts=" then ".join(str(size) for _, size in recipe.contexts),
        architecture=architecture,
        command=command,
        seen=about["steps"] * about["batch"] / 1e6,
        epochs=about["steps"] * about["batch"] / about["bytes"],
        package_text=packages,
        task_text=tasks,
        skip_text=skips,
        kernels="AdaSplash" if about["attention"] == "entmax" else "`scaled_dot_product_attention`",
    )


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
| parameters | {parameters:,}, {size:.2f} MB in bf16 |
| architecture | {architecture} |
| tokens | bytes: token id = byte value; 0 separates documents |

## Data

The standard library of Python {python}: {files} files, {megabytes:.1f} MB for training.{package_text}
Held out: {test_files} files of the standard library, {test_megabytes:.2f} MB, chosen by a hash of the relative path
(`examples/train/corpus.py`), so that the same files are held out under every Python version. The figure above
is the mean over consecutive windows of {context} bytes of the held-out files, joined; each window is
read without what came before it. It was computed on the training machine, with the bf16 weights and with {kernels}.
The library repeats itself: some held-out files, such as code pages and test suites, have near relatives among the
training files. Without `encodings/` and `test/`, on the other {distant_megabytes:.2f} MB, it is
**{distant_bits:.3f}**.{task_text}

## Training

    {command}

One {machine}, torch {torch}, {minutes:.1f} minutes: {steps} steps of {batch} bytes, {seen:.0f} MB in all
({epochs:.1f} passes over the data), at context {contexts}.{skip_text} Muon for the matrices, AdamW for the rest, bf16
autocast. The curve is in `training.csv`.

## Limits

It knows little but Python source. No instruction following, no safety training. It was trained on windows of at most
{context} bytes.

## Licence

Apache-2.0. The standard library is under the PSF licence, packages under theirs.
"""

if __name__ == "__main__":
    main()
