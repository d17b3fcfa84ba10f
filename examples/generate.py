"""Continues a Python file with an entmax language model, once for each way of reading its KV cache.

The file comes from the standard library and was not in the training data. The model is the one in
examples/stdlib-entmax, which `examples/train/train.py` has trained. Everything in the table is measured in this run.
"""

import argparse
import codecs
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

import entmaxkv.hf
from entmaxkv.metrics import Metrics, measure
from entmaxkv.select import Selector

sys.path.append(str(Path(__file__).parent / "train"))
from calls import with_cache
from corpus import default_source, files, held_out
from watch import Watch

MODEL = Path(__file__).parent / "stdlib-entmax"
CHUNK = 512  # prompt bytes per prefill step
STRIDE = 16  # of so many decode steps, one is measured against float64


def default_file(context: int) -> Path:
    """The first held-out file of the standard library that has more than context bytes, tests last."""
    fit = {name: path for name, path in files(default_source()).items() if held_out(name)}
    names = sorted(fit, key=lambda name: (name.startswith("test/"), name))
    for name in names:
        if fit[name].stat().st_size > context:
            return fit[name]
    raise SystemExit(f"no held-out file of more than {context} bytes in {default_source()}: use --file")


def prefill(model: PreTrainedModel, text: bytes, cache: entmaxkv.hf.EntmaxCache, console: Console) -> int:
    """Fills the cache with text, and returns the most likely next byte."""
    ids = torch.tensor([list(text)], device=model.device)
    with Progress(console=console) as bar:
        task = bar.add_task(f"prefill of {len(text)} bytes", total=len(text))
        for chunk in ids.split(CHUNK, dim=1):
            logits = model(input_ids=chunk, **with_cache(model, cache), logits_to_keep=1).logits
            bar.advance(task, chunk.shape[1])
    return int(logits[0, -1].argmax())


def step(model: PreTrainedModel, byte: int, cache: entmaxkv.hf.EntmaxCache) -> int:
    """Appends one byte and returns the most likely next one."""
    ids = torch.tensor([[byte]], device=model.device)
    return int(model(input_ids=ids, **with_cache(model, cache)).logits[0, -1].argmax())


def continuation(
    model: PreTrainedModel,
    byte: int,
    cache: entmaxkv.hf.EntmaxCache,
    tokens: int,
    seen: Callable[[int], object],
) -> tuple[bytes, float]:
    """The greedy text of `tokens` bytes that begins with `byte`, and the median seconds of a step.

    `seen` is called with each byte.
    """
    text = bytearray([byte])
    seen(byte)
    seconds = []
    for _ in range(tokens - 1):
        start = time.perf_counter()
        text.append(step(model, text[-1], cache))
        seconds.append(time.perf_counter() - start)
        seen(text[-1])
    return bytes(text), statistics.median(seconds)


@contextmanager
def shown_as_text(prompt: bytes, console: Console) -> Iterator[Callable[[int], None]]:
    """Prints the end of the prompt, and then each byte that the function in `with ... as` is called with."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    console.print(f"[dim]{prompt[-200:].decode('utf-8', 'replace')}[/dim]", end="", highlight=False)

    def show(byte: int) -> None:
        console.print(decoder.decode(bytes([byte])), end="", markup=False, highlight=False, soft_wrap=True)

    yield show
    console.print(decoder.decode(b"", final=True), markup=False, highlight=False, soft_wrap=True)


@contextmanager
def shown_as_bar(name: str, tokens: int, console: Console) -> Iterator[Callable[[int], None]]:
    """Shows a progress bar of `tokens` bytes; each call of the function in `with ... as` counts one."""
    with Progress(console=console, refresh_per_second=4) as bar:
        task = bar.add_task(f"{tokens} bytes by {name}", total=tokens)
        yield lambda _: bar.advance(task)


def measured(
    model: PreTrainedModel,
    text: bytes,
    cache: entmaxkv.hf.EntmaxCache,
    methods: dict[str, Selector | None],
    console: Console,
) -> dict[str, list[Metrics]]:
    """Every method's metrics in all layers, while the model decodes this text with dense attention."""
    found: dict[str, list[Metrics]] = {name: [] for name in methods}

    def see(q: Tensor, paged: entmaxkv.PagedKVCache, scoring: entmaxkv.Scoring) -> None:
        if measuring:
            for name, select in methods.items():
                found[name].append(measure(q, paged, select=select, **vars(scoring)))

    cache.select = Watch(see)
    with Progress(console=console) as bar:
        for i, byte in enumerate(bar.track(text[:-1], description="measuring against float64")):
            measuring = i % STRIDE == 0
            step(model, byte, cache)
    return found


def equal(text: bytes, other: bytes) -> int:
    """How many bytes the two texts have in common before the first that differs."""
    return next((i for i, (a, b) in enumerate(zip(text, other, strict=True)) if a != b), len(text))


def row(metrics: list[Metrics]) -> list[str]:
    """The measured columns of one method: means over steps, layers and heads."""

    def mean(name: str) -> float:
        return torch.stack([getattr(entry, name).double().mean() for entry in metrics]).mean().item()

    share = sum(entry.bytes_read for entry in metrics) / sum(entry.kv_bytes for entry in metrics)
    return [
        f"{mean('tokens'):.0f}",
        f"{share:.1%}",
        f"{mean('dropped_mass'):.4f}",
        f"{mean('support_recall'):.4f}",
        f"{mean('output_error'):.1e}",
        f"{mean('certified'):.0%}",
    ]


def unfit(args: argparse.Namespace) -> str | None:
    """An error message if the arguments do not fit, else None."""
    if args.context < 1 or args.tokens < 2:
        return f"expected --context >= 1 and --tokens >= 2, got {args.context} and {args.tokens}"
    if args.budget < 1:
        return f"expected --budget >= 1, got {args.budget}"
    if args.alpha is not None and not 1 <= args.alpha <= 2:
        return f"expected --alpha in [1, 2], got {args.alpha}"
    if args.file and not (args.file.is_file() and args.file.stat().st_size):
        return f"expected --file to be a file that is not empty, got {args.file}"
    if not (args.model / "config.json").is_file():
        return f"expected --model to be a folder with a config.json, got {args.model}"
    if args.device == "cuda" and not torch.cuda.is_available():
        return "--device cuda: expected a CUDA GPU, got none"
    if args.device == "cuda" and not torch._C._dispatch_has_kernel_for_dispatch_key("entmaxkv::dense_decode", "CUDA"):
        return "--device cuda: expected entmaxkv with CUDA decode kernels, got a build without them"
    return None


@torch.inference_mode()
def main() -> None:
    """Reads the prompt once, continues with each method from a copy of the cache, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, help="file to continue (default: a held-out standard library file)")
    parser.add_argument("--context", type=int, default=8192, help="bytes of the file to read first (default 8192)")
    parser.add_argument("--tokens", type=int, default=256, help="bytes to generate (default 256)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to run (default cpu)")
    parser.add_argument("--budget", type=int, default=1024, help="tokens that TopPages reads (default 1024)")
    parser.add_argument("--alpha", type=float, help="entmax alpha in [1, 2] (default: the model's, 1.5)")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the model (default float32)"
    )
    parser.add_argument("--model", type=Path, default=MODEL, help="folder (default: examples/stdlib-entmax)")
    args = parser.parse_args()
    if error := unfit(args):
        parser.error(error)
    console = Console()
    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        args.model, attn_implementation=entmaxkv.hf.NAME, dtype=getattr(torch, args.dtype)
    ).to(args.device)
    limit = model.config.max_position_embeddings
    if args.context + args.tokens > limit:
        parser.error(f"expected --context + --tokens <= {limit}, got {args.context} + {args.tokens}")
    if args.alpha is not None:
        model.config.entmax_alpha = args.alpha

    path = args.file or default_file(args.context)
    prompt = path.read_bytes()[: args.context]
    console.print(f"[bold]{path}[/bold], first {len(prompt)} bytes, alpha {model.config.entmax_alpha:g}")
    cache = entmaxkv.hf.EntmaxCache(model.config, len(prompt) + args.tokens)
    first = prefill(model, prompt, cache, console)

    methods: dict[str, Selector | None] = {
        "dense": None,
        "KeySketch()": entmaxkv.KeySketch(dense_below=0),
        f"TopPages({args.budget})": entmaxkv.TopPages(args.budget, dense_below=0),
        "Gaussian()": entmaxkv.Gaussian(dense_below=0),
    }
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption_justify="left")
    table.add_column("method", no_wrap=True)
    for title in ("tok/s", "keys\nread", "KV\nbytes", "δ", "recall", "error", "proved", "same\nbytes"):
        table.add_column(title, justify="right", no_wrap=True)
    texts, seconds = {}, {}
    for name, select in methods.items():
        own = copy.deepcopy(cache)
        own.select = select
        shown = shown_as_text(prompt, console) if select is None else shown_as_bar(name, args.tokens, console)
        with shown as seen:
            texts[name], seconds[name] = continuation(model, first, own, args.tokens, seen)
    found = measured(model, texts["dense"], cache, methods, console)
    for name, text in texts.items():
        same = f"{equal(text, texts['dense'])}/{args.tokens}"
        table.add_row(name, f"{1 / seconds[name]:.0f}", *row(found[name]), same)
    steps = len(range(0, args.tokens - 1, STRIDE))
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"the CPU, {torch.get_num_threads()} threads"
    table.caption = (
        f"{args.dtype} on {where}, torch {torch.__version__}. "
        f"tok/s: tokens per second of the whole model, by the median time of {args.tokens - 1} steps. "
        "keys read: per step and KV head. "
        "KV bytes: bytes read, as a share of the cache. Page statistics or sketch count, values without weight do not; "
        "in a short context this can exceed 100 %. "
        "δ: attention weight of the tokens that are not read. recall: share of the dense support that is read. "
        "error: relative error of the attention output, against float64. "
        "proved: share of the heads whose output is proved to be the dense one. "
        f"The columns from keys read to proved are means over {steps} steps of the dense continuation, all layers and "
        "all heads; every method gets the same queries. "
        "same bytes: generated bytes before the first that differs from dense."
    )
    console.print(table)


if __name__ == "__main__":
    main()
