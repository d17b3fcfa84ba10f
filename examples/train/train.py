"""Trains the example models: byte-level SmolLM3s with entmax-1.5 or softmax attention in every layer.

    pip install ".[train]"
    python examples/train/train.py stdlib  # a model like the one in examples/stdlib-entmax
    python examples/train/train.py twin --attention entmax  # one of the two models of docs/accuracy.md
    python examples/train/train.py twin --attention softmax  # the other

It needs one CUDA GPU. A stopped run goes on from the checkpoint in --out when the same command is given again. What a
step sees depends only on --seed and on the number of the step, so both twins see the same text.
"""

import argparse
import copy
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
from card import card
from corpus import RELATED, SEPARATOR, default_packages, default_source, files, held_out, package_texts, without_copies
from launches import fix_launches
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from tasks import overlay
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast, SmolLM3Config
from windows import Windows, positions

import entmaxkv.hf

CONTEXT = 16384
WARMUP, DECAY = 0.02, 0.5  # fractions of the steps
ALPHA = {"entmax": 1.5, "softmax": 1.0}
LOG_SECONDS, SAVE_SECONDS = 15, 60
TESTED_BYTES = 65536  # of the held-out text, for the evaluations during training
TEST_SEED = 2**32  # of the facts in the held-out text; the seeds of training are smaller


@dataclass(frozen=True)
class Recipe:
    """A model, the text that it is trained on, and the length of the training.

    Attributes:
        width, inner, layers, heads, kv_heads: sizes of the model; its heads have head_dim 64.
        nope_every: one of so many layers has no position encoding.
        theta: theta of RoPE.
        positions: positions that RoPE learns. If these are more than CONTEXT, half of the long windows skip some.
        steps: training steps, of --batch bytes each.
        short, short_share: the first steps, this fraction of all, have windows of `short` bytes. They cost less.
        learning_rate: peak of the learning rate.
        packages: whether the text includes installed packages beside the standard library.
        facts: fraction of the windows with key-value lines that come back, see tasks.py.
    """

    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    nope_every: int
    theta: float
    positions: int
    steps: int
    short: int
    short_share: float
    learning_rate: float
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
            no_rope_layers=[int((layer + 1) % self.nope_every != 0) for layer in range(self.layers)],
            rope_parameters={"rope_type": "default", "rope_theta": self.theta},
            max_position_embeddings=self.positions,
            tie_word_embeddings=True,
            pad_token_id=None,
            bos_token_id=0,
            eos_token_id=0,
            entmax_alpha=alpha,
        )


RECIPES = {
    "stdlib": Recipe(
        width=256,
        inner=576,
        layers=6,
        heads=4,
        kv_heads=2,
        nope_every=3,
        theta=5e4,
        positions=CONTEXT,
        steps=6810,
        short=4096,
        short_share=0.4,
        learning_rate=4e-3,
        packages=False,
        facts=0.0,
    ),
    "twin": Recipe(
        width=512,
        inner=1536,
        layers=8,
        heads=8,
        kv_heads=2,
        nope_every=2,
        theta=5e5,
        positions=131072,
        steps=4800,
        short=4096,
        short_share=0.6,
        learning_rate=3e-3,
        packages=True,
        facts=0.3,
    ),
}


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


def logits(model: nn.Module, tokens: Tensor, places: Tensor | None = None) -> Tensor:
    """The logits after tokens[:, :-1], which are at the positions `places`."""
    # No mask is needed. Without this, transformers would look at one to find that out, and wait for the device.
    inputs = {"input_ids": tokens[:, :-1], "position_ids": places, "attention_mask": {"full_attention": None}}
    with torch.autocast(tokens.device.type, torch.bfloat16):
        return model(**inputs, use_cache=False).logits.float()


def bits(found: Tensor, tokens: Tensor) -> Tensor:
    """The mean bits per byte of tokens[:, 1:] under the logits `found`."""
    return nn.functional.cross_entropy(found.flatten(0, 1), tokens[:, 1:].flatten()) / math.log(2)


@torch.no_grad()
def evaluate(model: nn.Module, text: np.ndarray, context: int) -> float:
    """Bits per byte over consecutive windows, each read without what came before it."""
    found = []
    for start in range(0, len(text) - context, context):
        tokens = torch.from_numpy(text[start : start + context + 1].astype(np.int64))[None].to(model.device)
        found.append(bits(logits(model, tokens), tokens).item())
    return sum(found) / len(found)


@torch.no_grad()
def recalled(model: nn.Module, text: np.ndarray, context: int) -> float:
    """Of the bytes of facts that come back, the fraction that the model predicts as the likeliest."""
    right = total = 0
    for start in range(0, len(text) - context, context):
        row = text[start : start + context + 1].copy()
        answers = torch.from_numpy(overlay(row, np.random.default_rng((TEST_SEED, start)))[1:]).to(model.device)
        tokens = torch.from_numpy(row.astype(np.int64))[None].to(model.device)
        hits = logits(model, tokens)[0].argmax(-1) == tokens[0, 1:]
        right, total = right + int((hits & answers).sum()), total + int(answers.sum())
    return right / total


def share_of_peak(progress: float) -> float:
    """The learning rate as a fraction of its peak: warm-up, plateau, linear decay to zero.

    `progress` is the fraction of the steps that are done.
    """
    return max(0.0, min(1.0, progress / WARMUP, (1 - progress) / DECAY))


def save(model: nn.Module, out: Path) -> None:
    """Writes the model in bf16 with its configuration and tokenizer."""
    state = {name: x.detach().bfloat16().cpu().contiguous() for name, x in model.state_dict().items()}
    state.pop("lm_head.weight")
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    config = copy.deepcopy(model.config)
    config.dtype = torch.bfloat16
    config.architectures = [type(model).__name__]
    config.save_pretrained(out)
    GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0).save_pretrained(out)
    byte_tokenizer(config.max_position_embeddings).save_pretrained(out)


class Run:
    """The state of a training run, which is saved in a checkpoint from time to time.

    Attributes:
        settings: What must be the same when a run goes on.
        step, seconds: Steps and time so far.
        log: One entry for each evaluation.
        losses: The losses of the steps since the last entry of the log.
    """

    def __init__(self, out: Path, settings: dict[str, Any], model: nn.Module, optimizers: list[torch.optim.Optimizer]):
        self.path = out / "checkpoint.pt"
        self.settings, self.model, self.optimizers = settings, model, optimizers
        self.step, self.seconds = 0, 0.0
        self.log: list[dict[str, float]] = []
        self.losses: list[Tensor] = []
        if self.path.exists():
            device = next(model.parameters()).device
            state = torch.load(self.path, map_location=device, weights_only=True)
            for name, value in settings.items():
                if state["settings"][name] != value:
                    raise SystemExit(
                        f"{self.path}: expected {name} {state['settings'][name]}, as the run began, got {value}; "
                        "give another --out, or remove the checkpoint to begin anew"
                    )
            model.load_state_dict(state["model"])
            for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.step, self.seconds, self.log = state["step"], state["seconds"], state["log"]
            self.losses = list(state["losses"])

    def save(self) -> None:
        state = {
            "settings": self.settings,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
            "log": self.log,
            "losses": torch.stack(self.losses) if self.losses else torch.empty(0),
        }
        torch.save(state, self.path.with_suffix(".new"))
        os.replace(self.path.with_suffix(".new"), self.path)


def optimizers_of(model: nn.Module, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for all other parameters."""
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    return [
        torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def take(run: Run, recipe: Recipe, windows: Windows, *, steps: int, batch: int, peak: float) -> int:
    """Takes one training step, and returns the length of its windows."""
    progress = run.step / steps
    context = recipe.short if progress < recipe.short_share else CONTEXT
    device = next(run.model.parameters()).device
    places = None
    if context == CONTEXT < recipe.positions:
        places = positions(run.step, context, recipe.positions, windows.seed)
        places = places.pin_memory().to(device, non_blocking=True)
    tokens = windows.batch(run.step, batch // context, context).pin_memory().to(device, non_blocking=True)
    loss = bits(logits(run.model, tokens, places), tokens)
    loss.backward()
    nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = peak * share_of_peak(progress)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    run.step += 1
    run.losses.append(loss.detach())
    return context


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def arguments() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("recipe", choices=RECIPES, help="what to train; stdlib: 3.9M parameters, twin: 24M")
    parser.add_argument("--attention", choices=ALPHA, default="entmax", help="in every layer (default entmax)")
    parser.add_argument("--source", type=Path, default=default_source(), help="folder of the standard library")
    parser.add_argument("--packages", type=Path, default=default_packages(), help="folder of packages, for twin")
    parser.add_argument("--python", default=platform.python_version(), help="version of that standard library")
    parser.add_argument("--out", type=Path, help="output folder (default runs/RECIPE-ATTENTION)")
    parser.add_argument("--steps", type=positive, help="training steps (default: the recipe's)")
    parser.add_argument("--batch", type=positive, default=65536, help="bytes per step (default 65536)")
    parser.add_argument("--learning-rate", type=float, help="peak of the learning rate (default: the recipe's)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default 0)")
    parser.add_argument("--stop", type=positive, help="stop after this step; the same command goes on")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("expected a CUDA GPU, got none")
    if args.batch % CONTEXT:
        parser.error(f"--batch: expected a multiple of {CONTEXT}, got {args.batch}")
    if args.learning_rate is not None and not args.learning_rate > 0:
        parser.error(f"--learning-rate: expected a number above 0, got {args.learning_rate}")
    if not 0 <= args.seed < TEST_SEED:
        parser.error(f"--seed: expected a number from 0 to {TEST_SEED - 1}, got {args.seed}")
    if not any(held_out(name) for name in files(args.source)):
        parser.error(f"--source: expected a standard library with held-out files, got {args.source}")
    args.out = args.out or Path("runs") / f"{args.recipe}-{args.attention}"
    return args


def main() -> None:
    """Trains the model, evaluates it on the held-out files, and writes it with its card and its log."""
    args = arguments()
    recipe = RECIPES[args.recipe]
    steps, peak = args.steps or recipe.steps, args.learning_rate or recipe.learning_rate
    args.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")

    corpus = {name: path.read_bytes() for name, path in files(args.source).items()}
    train = [text for name, text in corpus.items() if not held_out(name)]
    tests = {name: text + SEPARATOR for name, text in corpus.items() if held_out(name)}
    found = package_texts(args.packages) if recipe.packages else []
    packages = without_copies(found, tests.values())
    windows = Windows(train + packages, recipe.facts, args.seed)
    test = np.frombuffer(b"".join(tests.values()), np.uint8)
    distant = np.frombuffer(b"".join(text for name, text in tests.items() if not name.startswith(RELATED)), np.uint8)
    about: dict[str, Any] = {
        "python": args.python,
        "files": len(train),
        "megabytes": sum(map(len, train)) / 1e6,
        "package_files": len(packages),
        "package_copies": len(found) - len(packages),
        "package_megabytes": sum(map(len, packages)) / 1e6,
        "test_files": len(tests),
        "test_megabytes": len(test) / 1e6,
        "distant_megabytes": len(distant) / 1e6,
        "text": windows.digest(),
    }
    console.print(about)

    if args.attention == "entmax":
        fix_launches()
    model = AutoModelForCausalLM.from_config(
        recipe.configuration(ALPHA[args.attention]), attn_implementation=entmaxkv.hf.NAME, dtype=torch.float32
    ).cuda()
    torch._dynamo.config.recompile_limit = 64
    for layer in model.model.layers:
        layer.compile(dynamic=False)
    settings = {**asdict(recipe), "recipe": args.recipe, "attention": args.attention, "seed": args.seed}
    settings |= {"steps": steps, "batch": args.batch, "learning_rate": peak, "text": about["text"]}
    run = Run(args.out, settings, model, optimizers_of(model, peak))
    if run.step:
        console.print(f"going on after step {run.step}")

    before = run.seconds
    start = told = kept = time.perf_counter()
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("compiling", total=steps, completed=run.step)
        while run.step < min(steps, args.stop or steps):
            context = take(run, recipe, windows, steps=steps, batch=args.batch, peak=peak)
            if run.step % 10 == 0:
                run.losses[-1].item()  # waits for the device, so that the measured time is at most ten steps off
                bar.update(task, completed=run.step, description=f"step {run.step}, context {context}")
            now = time.perf_counter()
            run.seconds = before + now - start
            if now - told > LOG_SECONDS or run.step == steps:
                entry = {
                    "seconds": round(run.seconds, 1),
                    "step": run.step,
                    "context": context,
                    "train_bits": round(torch.stack(run.losses).mean().item(), 4),
                }
                for size in dict.fromkeys((context, CONTEXT)):
                    entry[f"bits_{size}"] = round(evaluate(model, test[: TESTED_BYTES + 1], size), 4)
                    if recipe.facts:
                        entry[f"recalled_{size}"] = round(recalled(model, test[: TESTED_BYTES + 1], size), 4)
                console.print(json.dumps(entry), soft_wrap=True)
                run.log.append(entry)
                run.losses.clear()
                told = time.perf_counter()
            if now - kept > SAVE_SECONDS:
                run.save()
                kept = time.perf_counter()
    run.save()
    if run.step < steps:
        console.print(f"stopped after step {run.step} of {steps}; the same command goes on")
        return

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    results = {"bits": evaluate(model, test, CONTEXT), "distant_bits": evaluate(model, distant, CONTEXT)}
    if recipe.facts:
        results["recalled"] = recalled(model, test, CONTEXT)
    console.print(results)
    save(model, args.out)
    about |= settings | results | {"parameters": sum(p.numel() for p in model.parameters())}
    about |= {"minutes": run.seconds / 60, "size": (args.out / "model.safetensors").stat().st_size}
    about |= {"context": CONTEXT, "name": args.out.name}
    end = {"steps": steps, "minutes": about["minutes"], **results}
    document = {
        "machine": {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__},
        "about": about,
        "rows": [{"kind": "training", "model": args.out.name, **entry} for entry in [*run.log, end]],
    }
    (args.out / "training.json").write_text(json.dumps(document, indent=1) + "\n")
    (args.out / "README.md").write_text(card(about, document["machine"]))


if __name__ == "__main__":
    main()
