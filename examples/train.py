"""Trains the model that ships in examples/stdlib-entmax: a byte-level SmolLM3 with entmax-1.5 in every layer.

    pip install adasplash && python examples/train.py --minutes 8.2

It takes one CUDA GPU. The data is the running Python's standard library (`--source` for another).
"""

import argparse
import copy
import csv
import json
import math
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import adasplash.adasplash_v2 as kernels
import numpy as np
import torch
import triton
from corpus import SEPARATOR, default_source, files, held_out
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast, SmolLM3Config

import entmaxkv.hf

OUT = Path(__file__).parent / "stdlib-entmax"
CONTEXT = 16384
# (from this share of the time on, context): short windows first, they are cheaper.
CONTEXTS = ((0.0, 4096), (0.4, CONTEXT))
# Held-out files in these folders have near relatives among the training files.
RELATED = ("encodings/", "test/")
WARMUP, DECAY = 0.02, 0.5  # shares of the time

# AdaSplash's own search over launch configurations costs minutes for every context. Of (warps, stages) in
# {2, 4} x {2, 3}, (4, 3) was the fastest on an H200: 10.9 ms for 4 x 16384 tokens of one layer, forward and
# backward, against 12.1 to 25.9.
LAUNCH = {"num_warps": 4, "num_stages": 3}


def fix_launches() -> None:
    """Replaces AdaSplash's search by LAUNCH."""
    kernels._get_tau.configs = [triton.Config({"BLOCK_M": 64, "BLOCK_N": 64}, **LAUNCH)]
    for name in ("_get_tau_v2", "_get_tau_v3", "_get_output", "_bwd_q_kernel", "_bwd_kv_kernel"):
        getattr(kernels, name).configs = [triton.Config({}, **LAUNCH)]


def configuration() -> SmolLM3Config:
    """3.9M parameters; every third layer has no position encoding."""
    return SmolLM3Config(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=576,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        no_rope_layers=[1, 1, 0, 1, 1, 0],
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=None,
        bos_token_id=0,
        eos_token_id=0,
        entmax_alpha=1.5,
    )


def byte_tokenizer() -> PreTrainedTokenizerFast:
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
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def batches(documents: list[np.ndarray], context: int, batch: int, rng: np.random.Generator) -> Iterator[Tensor]:
    """Endless batches [batch, context + 1] int64: shuffled documents, joined and cut into windows."""
    while True:
        text = np.concatenate([documents[i] for i in rng.permutation(len(documents))])
        text = text[rng.integers(context) :]
        windows = rng.permutation((len(text) - 1) // context)
        for chosen in windows[: len(windows) // batch * batch].reshape(-1, batch):
            rows = np.stack([text[window * context : window * context + context + 1] for window in chosen])
            yield torch.from_numpy(rows.astype(np.int64))


def bits(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean bits per byte of predicting tokens[:, 1:] from what precedes."""
    with torch.autocast("cuda", torch.bfloat16):
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten()) / math.log(2)


@torch.no_grad()
def evaluate(model: nn.Module, text: np.ndarray, windows: int | None = None) -> float:
    """Bits per byte over consecutive windows of CONTEXT bytes, each read without what came before it."""
    stop = (len(text) - 1) // CONTEXT if windows is None else windows
    rows = [text[i * CONTEXT : (i + 1) * CONTEXT + 1].astype(np.int64) for i in range(stop)]
    return sum(bits(model, torch.from_numpy(row)[None].cuda()).item() for row in rows) / len(rows)


def learning_rate(progress: float) -> float:
    """Share of the peak rate at this share of the time: warm-up, plateau, linear decay to zero."""
    return max(0.0, min(1.0, progress / WARMUP, (1 - progress) / DECAY))


def save(model: nn.Module, out: Path) -> None:
    """Writes the model in bf16 with its configuration and tokenizer."""
    out.mkdir(parents=True, exist_ok=True)
    state = {name: x.detach().bfloat16().cpu().contiguous() for name, x in model.state_dict().items()}
    state.pop("lm_head.weight")
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    config = copy.deepcopy(model.config)
    config.dtype = torch.bfloat16
    config.save_pretrained(out)
    GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0).save_pretrained(out)
    byte_tokenizer().save_pretrained(out)


def main() -> None:
    """Trains, evaluates on the held-out files, and writes the model with its card."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--source", type=Path, default=default_source(), help="folder of Python files")
    parser.add_argument("--python", default=platform.python_version(), help="the version of that source")
    parser.add_argument("--out", type=Path, default=OUT, help="output folder")
    parser.add_argument("--minutes", type=float, default=8.2, help="training time")
    parser.add_argument("--batch", type=int, default=65536, help="bytes per step")
    parser.add_argument("--rate", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    console = Console()
    torch.manual_seed(args.seed)
    fix_launches()
    torch.set_float32_matmul_precision("high")

    corpus = {name: path.read_bytes() + SEPARATOR for name, path in files(args.source).items()}
    train = [np.frombuffer(text, np.uint8) for name, text in corpus.items() if not held_out(name)]
    test = np.frombuffer(b"".join(text for name, text in corpus.items() if held_out(name)), np.uint8)
    distant = np.frombuffer(
        b"".join(text for name, text in corpus.items() if held_out(name) and not name.startswith(RELATED)), np.uint8
    )
    train_bytes = sum(map(len, train))
    test_files = len(corpus) - len(train)
    console.print(f"training on {train_bytes:,} bytes in {len(train)} files, {len(test):,} in {test_files} held out")

    model = AutoModelForCausalLM.from_config(
        configuration(), attn_implementation=entmaxkv.hf.NAME, dtype=torch.float32
    ).cuda()
    parameters = sum(p.numel() for p in model.parameters())
    torch._dynamo.config.recompile_limit = 64
    for layer in model.model.layers:
        layer.compile(dynamic=False)
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=args.rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=args.rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]

    rng = np.random.default_rng(args.seed)
    log: list[dict[str, float]] = []
    losses: list[Tensor] = []
    step = seen = context = 0
    start = time.perf_counter()
    told = start
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("compiling", total=1.0)
        while (progress := (time.perf_counter() - start) / (60 * args.minutes)) < 1:
            if (now := [size for share, size in CONTEXTS if progress >= share][-1]) != context:
                context = now
                data = batches(train, context, args.batch // context, rng)
            tokens = next(data).pin_memory().cuda(non_blocking=True)
            loss = bits(model, tokens)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = args.rate * learning_rate(progress)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step, seen = step + 1, seen + tokens[:, 1:].numel()
            losses.append(loss.detach())
            if step % 10 == 0:
                losses[-1].item()  # keeps the host within ten steps of the device, so that the clock is true
                bar.update(task, completed=progress, description=f"step {step}, context {context}")
            if time.perf_counter() - told > 15:
                told = time.perf_counter()
                entry = {
                    "seconds": round(told - start, 1),
                    "step": step,
                    "bytes": seen,
                    "context": context,
                    "train_bits": round(torch.stack(losses).mean().item(), 4),
                    "held_out_bits": round(evaluate(model, test, windows=4), 4),
                }
                console.print(json.dumps(entry), soft_wrap=True)
                log.append(entry)
                losses.clear()
                save(model, args.out)
    seconds = time.perf_counter() - start

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    held_out_bits = evaluate(model, test)
    distant_bits = evaluate(model, distant)
    console.print(f"held-out bits per byte at context {CONTEXT}: {held_out_bits:.4f}")
    save(model, args.out)
    with (args.out / "training.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(log[0]) if log else [])
        writer.writeheader()
        writer.writerows(log)
    (args.out / "README.md").write_text(
        CARD.format(
            python=args.python,
            files=len(train),
            megabytes=train_bytes / 1e6,
            test_files=test_files,
            test_megabytes=len(test) / 1e6,
            parameters=parameters / 1e6,
            size=(args.out / "model.safetensors").stat().st_size / 1e6,
            context=CONTEXT,
            contexts=" then ".join(str(size) for _, size in CONTEXTS),
            minutes=f"{args.minutes:g}",
            elapsed=seconds / 60,
            batch=args.batch,
            rate=args.rate,
            seed=args.seed,
            seen=seen / 1e6,
            epochs=seen / train_bytes,
            steps=step,
            machine=torch.cuda.get_device_name(),
            torch=torch.__version__,
            bits=held_out_bits,
            distant_bits=distant_bits,
            distant_megabytes=len(distant) / 1e6,
        )
    )


CARD = """\
---
license: apache-2.0
library_name: transformers
---

# stdlib-entmax

A byte-level language model with entmax attention (alpha 1.5) in every layer, small enough to ship with
`entmaxkv` as its demo. It continues Python source.

| | |
|---|---|
| held-out bits per byte | **{bits:.3f}** at context {context} |
| parameters | {parameters:.2f}M, {size:.2f} MB in bf16 |
| architecture | SmolLM3: 6 layers, width 256, 4 query and 2 KV heads of 64; layers 3 and 6 without RoPE |
| tokens | bytes: token id = byte value; 0 separates documents |

## Data

The standard library of Python {python}, its tests included: {files} files, {megabytes:.1f} MB for training.
Held out: {test_files} files, {test_megabytes:.2f} MB, chosen by a hash of the relative path
(`examples/corpus.py`), so that the same files are held out under every Python version. The figure above
is the mean over consecutive windows of {context} bytes of the held-out files, joined; each window is
read without what came before it. It was computed on the training machine, with the bf16 weights that
ship and with AdaSplash. The library repeats itself: some held-out files, such as code pages and test
suites, have near relatives among the training files. Without `encodings/` and `test/`, on the other
{distant_megabytes:.2f} MB, it is **{distant_bits:.3f}**.

## Training

    python examples/train.py --minutes {minutes} --batch {batch} --rate {rate:g} --seed {seed}

One {machine}, torch {torch}, {elapsed:.1f} minutes: {steps} steps of {batch} bytes, {seen:.0f} MB in all
({epochs:.1f} passes over the data), at context {contexts}. Muon for the matrices, AdamW for the rest, bf16
autocast, attention by AdaSplash. The curve is in `training.csv`.

## Limits

It has seen nothing but the Python standard library, and every file many times: it completes that style and
knows little else. No instruction following, no safety training. It was trained on windows of at most
{context} bytes.

## Licence

Apache-2.0. The training data is the CPython standard library (PSF licence).
"""

if __name__ == "__main__":
    main()
