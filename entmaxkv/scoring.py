"""How a decode step scores tokens and weighs them."""

from dataclasses import InitVar, dataclass

import torch
from torch import Tensor

from entmaxkv import check


@dataclass(frozen=True, kw_only=True, eq=False)  # tensors are not compared
class Scoring:
    """How a decode step scores tokens, and how it turns the scores into weights.

    The score of token i is s_i = scale q.k_i + slope (i - position), where position = seq_len - 1 is that of the query.
    With z_i = (alpha - 1) s_i its weight is p_i = [z_i - tau]_+^(1 / (alpha - 1)). The threshold tau is such that the
    weights sum to 1. Where alpha is 1, this is softmax: p_i = exp(s_i - tau).

    Attributes:
        alpha: 1 is softmax, 1.5 the usual entmax, 2 sparsemax; a number in [1, 2] or one per head, [q_heads] float32.
        scale: factor of the products q.k_i; None for 1 / sqrt(head_dim).
        alibi_slopes: [q_heads] float32, the slope of each head; None for none.

    Args:
        caller: the name with which error messages begin.

    Raises:
        ValueError: a field is not of the kind that the ops take. The ops check ranges and sizes.
    """

    alpha: float | Tensor = 1.5
    scale: float | None = None
    alibi_slopes: Tensor | None = None
    caller: InitVar[str] = "Scoring"

    def __post_init__(self, caller: str) -> None:
        alpha, scale = self.alpha, self.scale
        if not (alpha.dim() == 1 if isinstance(alpha, Tensor) else check.is_number(alpha)):
            expected = "expected a number or a tensor [q_heads]"
            raise ValueError(f"{caller}: alpha: {expected}, got {check.described(alpha)}")
        if scale is not None and not check.is_number(scale):
            raise ValueError(f"{caller}: scale: expected a number or None, got {check.described(scale)}")
        if self.alibi_slopes is not None:
            check.tensor(f"{caller}: alibi_slopes", self.alibi_slopes, "[q_heads]")

    @property
    def number(self) -> float:
        """The argument `alpha` of the ops, which `per_head` replaces where it is not None."""
        return 1.5 if isinstance(self.alpha, Tensor) else float(self.alpha)

    @property
    def per_head(self) -> Tensor | None:
        """The argument `head_alpha` of the ops."""
        return self.alpha if isinstance(self.alpha, Tensor) else None

    def for_ops(self, q: Tensor) -> "Scoring":
        """The same, but for an alpha that changes between calls of a compiled function: that becomes a tensor.

        An op is compiled anew for every value of a number. The compiler keeps a number that has changed between calls
        as a variable, but only in arithmetic on tensors. So such an alpha is rounded to float32.

        Args:
            q: [batch, q_heads, head_dim], the query that the ops get.
        """
        if isinstance(self.alpha, Tensor) or not torch.compiler.is_compiling():
            return self
        from torch.fx.experimental.symbolic_shapes import has_static_value  # takes long to import

        if has_static_value(self.alpha):
            return self
        per_head = (torch.ones(q.shape[1], dtype=torch.float64, device=q.device) * self.alpha).float()
        return Scoring(alpha=per_head, scale=self.scale, alibi_slopes=self.alibi_slopes)
