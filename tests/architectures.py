"""Runs every causal language model of transformers, tiny and random, by entmaxkv at alpha = 1 and by `eager`.

    python tests/architectures.py            runs all, prints what is wrong, and writes docs/models.md
    python tests/architectures.py llama opt  runs these and prints each of their results

A case is right if entmaxkv gives eager's logits, or if it refuses the model with an error that says why.
"""

import argparse
import dataclasses
import inspect
import re
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import MODEL_TYPES, build, state_alpha
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import eager_mask

import entmaxkv
from entmaxkv import hf

PAGE = Path(__file__).parents[1] / "docs" / "models.md"

EQUAL, REFUSED, SKIPPED = "equal", "refused", "skipped"
CLEAR = (EQUAL, REFUSED, SKIPPED)
PAGED = "paged"
MIXED = "paged in full layers, transformers' own in the others"
DYNAMIC = "only without EntmaxCache"
NOT_TRIED = "not tried"
WRONG = "wrong or without a clear error"
KINDS = (PAGED, MIXED, DYNAMIC, REFUSED, NOT_TRIED, WRONG)

TOKENS = 24
CHUNKS = (9, 1, 7, 1, 1, 1, 4)
PADDING = 7
# Both in standard deviations of the logits. Rounding makes less than 5e-5, hiding one key at least 0.3.
TOLERANCE = 1e-3
SENSITIVITY = 0.1


def blind_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
):
    """`eager` that hides the oldest key from every query but the first: what a wrong attention would do at least."""
    if attention_mask is not None and attention_mask.dim() == 4:
        attention_mask = attention_mask.clone()
        attention_mask[:, :, 1:, 0] = torch.finfo(attention_mask.dtype).min
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return eager(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register("blind", blind_attention)
AttentionMaskInterface.register("blind", eager_mask)


@dataclasses.dataclass
class Case:
    """A batch of rows that a model reads in parts, each with the cache of those before."""

    rows: Tensor
    parts: tuple[int, ...]
    mask: Tensor | None = None

    def logits(self, model: nn.Module, cache: Any) -> Tensor:
        """The logits of all real tokens [tokens, vocabulary]."""
        takes = inspect.signature(model.forward).parameters
        logits, seen = [], 0
        for part in self.rows.split(self.parts, dim=1):
            inputs, end = {"input_ids": part}, seen + part.shape[1]
            if self.mask is not None:
                inputs["attention_mask"] = self.mask[:, :end]
                if "position_ids" in takes:
                    inputs["position_ids"] = (self.mask.cumsum(1) - 1).clamp(min=0)[:, seen:end]
            if cache is None:
                inputs["use_cache"] = False
            else:  # its name in new models, and in all from transformers 5.40 on, is another
                inputs["cache" if "cache" in takes else "past_key_values"] = cache
            torch.manual_seed(0)  # some models draw random numbers in every forward pass
            logits.append(model(**inputs).logits)
            seen = end
        out = torch.cat(logits, dim=1)
        return (out if self.mask is None else out[self.mask.bool()]).flatten(0, -2)


def make_cases() -> dict[str, Case]:
    rows = torch.randint(5, 90, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(rows)
    mask[0, :PADDING] = 0
    return {
        "prefill": Case(rows[:1], (TOKENS,)),
        "chunks": Case(rows[:1], CHUNKS),
        "padding": Case(rows, (TOKENS - 2, 1, 1), mask),
    }


CASES = make_cases()


def judge(case: Case, expected: Tensor | Exception, model: nn.Module, make_cache: Callable[[Case], Any]) -> str:
    """Whether entmaxkv gives a case the logits of eager, and what happens if it does not."""
    try:
        cache = make_cache(case)
        actual = case.logits(model, cache)
    except Exception as error:
        return described(error, expected)
    if isinstance(expected, Exception):
        return f"{SKIPPED}: eager itself: {expected}"
    if isinstance(cache, hf.EntmaxCache) and not cache.get_seq_length():
        return f"{SKIPPED}: a model that keeps nothing in a transformers cache"
    difference = float((actual - expected).abs().max() / expected.std())
    return EQUAL if difference <= TOLERANCE else f"differs by {difference:.2g} standard deviations of the logits"


def described(error: Exception, expected: Tensor | Exception | None = None) -> str:
    """An error in one line: a refusal by entmaxkv, what eager raises as well, or a fault."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    ours = Path(frame.filename).is_relative_to(Path(entmaxkv.__file__).parent)
    if ours and isinstance(error, ValueError | RuntimeError) and str(error).startswith(("entmaxkv", "EntmaxCache")):
        return f"{REFUSED}: {error}"
    if isinstance(expected, Exception):
        return f"{SKIPPED}: eager itself: {expected}"
    return f"raises {error!r} in {Path(frame.filename).name}:{frame.lineno}"


@dataclasses.dataclass
class Outcome:
    """What entmaxkv does with a model, and the result of each case."""

    model_type: str
    kind: str
    reason: str = ""
    results: dict[str, str] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0

    @property
    def faults(self) -> list[str]:
        """Differences and unclear errors."""
        return [f"{case}: {result}" for case, result in self.results.items() if not result.startswith(CLEAR)]


@torch.no_grad()
def sweep(model_type: str) -> Outcome:
    """Runs all cases of a model by eager and by entmaxkv, with transformers' cache and with EntmaxCache."""
    start = time.perf_counter()
    outcome = Outcome(model_type, NOT_TRIED)
    try:
        eager = build(model_type, "eager")
        alone = CASES["prefill"].logits(eager, None)
        assert alone.isfinite().all(), "eager's logits are not finite"
    except Exception as error:
        outcome.reason = f"{type(error).__name__}: {error}"
    else:
        dynamic, paged, layers = compare(model_type, eager, alone)
        outcome.results = {f"DynamicCache, {name}": result for name, result in dynamic.items()}
        outcome.results |= {f"EntmaxCache, {name}": result for name, result in paged.items()}
        outcome.kind, outcome.reason = verdict(dynamic, paged, layers)
        if outcome.faults:
            outcome.kind, outcome.reason = WRONG, outcome.faults[0]
    outcome.seconds = time.perf_counter() - start
    return outcome


def compare(model_type: str, eager: nn.Module, alone: Tensor) -> tuple[dict[str, str], dict[str, str], set[type]]:
    """The results of the cases with a DynamicCache and with EntmaxCache, and the classes of the latter's layers."""
    try:
        model = build(model_type, hf.NAME)
    except Exception as error:
        return {"construction": described(error)}, {"construction": described(error)}, set()
    layers: set[type] = set()

    def dynamic_cache(case: Case) -> DynamicCache:
        return DynamicCache(config=model.config)

    def entmax_cache(case: Case) -> hf.EntmaxCache:
        cache = hf.EntmaxCache(model.config, max_tokens=TOKENS, batch=len(case.rows))
        layers.update(map(type, cache.layers))
        return cache

    dynamic = {"no cache": judge(CASES["prefill"], alone, model, lambda case: None)}
    if dynamic["no cache"] == EQUAL and not reads_alpha(model_type, model, alone):
        dynamic["no cache"] = "never asks for alpha"
    paged = {}
    for name, case in CASES.items():
        expected = reference(case, eager)
        dynamic[name] = judge(case, expected, model, dynamic_cache)
        paged[name] = judge(case, expected, model, entmax_cache)
    return dynamic, paged, layers


def reference(case: Case, eager: nn.Module) -> Tensor | Exception:
    """The logits of eager, or why there are none."""
    try:
        logits = case.logits(eager, DynamicCache(config=eager.config))
        if case.mask is not None:
            # Recurrent layers that do not mask padding carry whatever attention returns there to the real tokens.
            other = dataclasses.replace(case, rows=torch.where(case.mask.bool(), case.rows, 4))
            assert torch.allclose(other.logits(eager, DynamicCache(config=eager.config)), logits, atol=TOLERANCE), (
                "its logits depend on the token ids of padding"
            )
    except Exception as error:
        return error
    return logits


def reads_alpha(model_type: str, model: nn.Module, alone: Tensor) -> bool:
    """Whether a model that equals eager goes through entmaxkv, and not by chance: or has no attention to go there."""
    blind = CASES["prefill"].logits(build(model_type, "blind"), None)
    attends = float((blind - alone).abs().max() / alone.std())
    assert not 0 < attends < SENSITIVITY, f"{model_type}: a hidden key changes the logits by {attends} only"
    state_alpha(model.config, 3.0)
    try:
        CASES["prefill"].logits(model, None)
    except ValueError:
        return True
    finally:
        state_alpha(model.config, 1.0)
    return attends == 0 and type(model)._can_set_attn_implementation()


def verdict(dynamic: dict[str, str], paged: dict[str, str], layers: set[type]) -> tuple[str, str]:
    """The kind of outcome, and the first refusal."""
    refusals = [result for result in paged.values() if result != EQUAL]
    if EQUAL in paged.values() and not any(result.startswith(REFUSED) for result in refusals):
        return PAGED if layers == {hf.EntmaxLayer} else MIXED, "; ".join(refusals)
    if EQUAL in dynamic.values():
        return DYNAMIC, refusals[0]
    return REFUSED, next(iter(dynamic.values()))


def page(outcomes: list[Outcome]) -> str:
    """docs/models.md: the model types by outcome and reason."""
    lines = [
        "# Models of transformers",
        "",
        "What `entmaxkv.hf` does with each causal language model of transformers. Each was built tiny, with random",
        "weights, and run at alpha = 1 against `eager`. `python tests/architectures.py` does so and writes this page.",
        "[transformers.md](transformers.md) says what the reasons mean.",
        "",
        f"Versions: transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}.",
    ]
    for kind in KINDS:
        reasons: dict[str, list[str]] = {}
        for outcome in outcomes:
            if outcome.kind == kind:
                reasons.setdefault(few_words(outcome.reason), []).append(outcome.model_type)
        if reasons:
            lines += ["", f"## {kind[0].upper()}{kind[1:]}: {sum(map(len, reasons.values()))}", ""]
            lines += ["| model types | reason |", "|---|---|"] if any(reasons) else []
            lines += [
                f"| {', '.join(names)} | {reason} |" if any(reasons) else ", ".join(names)
                for reason, names in sorted(reasons.items())
            ]
    return "\n".join(lines) + "\n"


def few_words(reason: str) -> str:
    """An error's text without the values of one model, for a cell of a table."""
    reason = re.sub(rf"^{REFUSED}: (entmaxkv( attention)?|EntmaxCache): ", "", reason)
    reason = re.sub(r"(, got |; ).*", "", " ".join(reason.split()))
    return reason.replace("|", "\\|")[:160]


def committed(text: str) -> dict[str, str]:
    """The kind that a page states of each model type."""
    kinds: dict[str, str] = {}
    for section in text.split("\n## ")[1:]:
        heading, *lines = section.splitlines()
        kind = next(known for known in KINDS if heading.lower().startswith(f"{known}: ".lower()))
        for line in lines:
            if not line.startswith(("|---", "| model types")):
                kinds |= dict.fromkeys(filter(None, line.split(" | ")[0].strip("| ").split(", ")), kind)
    return kinds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_types", nargs="*", metavar="MODEL_TYPE")
    wanted = parser.parse_args().model_types
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    outcomes = []
    for model_type in wanted or MODEL_TYPES:
        outcome = sweep(model_type)
        outcomes.append(outcome)
        print(f"{model_type}: {outcome.kind}", outcome.reason, sep="; ", flush=True)
        results = [f"{case}: {result}" for case, result in outcome.results.items()] if wanted else outcome.faults
        for result in results:
            print("    " + result, flush=True)
    if not wanted:
        PAGE.write_text(page(outcomes))
    slowest = sorted(outcomes, key=lambda outcome: -outcome.seconds)[:10]
    print(f"{sum(outcome.seconds for outcome in outcomes):.0f} s; the slowest: ", end="")
    print(", ".join(f"{outcome.model_type} {outcome.seconds:.1f} s" for outcome in slowest))
    return any(outcome.faults for outcome in outcomes)


if __name__ == "__main__":
    sys.exit(main())
