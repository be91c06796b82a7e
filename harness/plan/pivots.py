"""What is left of a column's error once later columns have reacted to it, from fewer tokens than would show it.

With H = mean x x^T the cost of column i is its pivot, 1 / [(H + damp I)^-1]_ii over i and the columns quantised after
it. From N tokens it comes out too small, for the others fit their noise too: at N = I inputs a third to two thirds of
what it is, and below that hardly more than the damping. This is a bias that is known. For any spectrum, as N and I grow
together (Marchenko & Pastur 1967; Ledoit & Peche 2011), the inverse is on average that of the true H at a larger
damping kappa,

    (H_N + damp I)^-1  ~  kappa / damp (H + kappa I)^-1,      kappa = damp / (1 - f / N),   f = tr H_N (H_N + damp I)^-1

so kappa / damp times what is measured is the pivot at damping kappa. The pivot is the least of functions linear in the
damping, hence concave in it: from kappa it is followed back to damp along its tangent, whose slope is measured too.
Everything comes from the Cholesky factor U of the inverse, H_p^-1 = U_p^T U_p for the columns p from any i on.

Mean pivot over the true one, of inputs with known Hessians (spectrum 1/n; as measured -> here): 512 inputs and 4,096
tokens 0.92 -> 1.00; 1,536 and 4,096 0.73 -> 1.00; 1,536 and 1,536 0.35 -> 1.01; 4,096 and 4,096 0.34 -> 1.01; 512 and
189 0.11 -> 1.12. The tokens of a text are fewer than they count, for they repeat one another: of what 24,576 tokens
give, 4,096 give 0.71 -> 0.85 for a down_proj of the default model with 1,536 inputs, 0.83 -> 0.88 for the up_proj
beside it with 576. Hence the tokens as well, four to every input of the widest layer (`sensitivity.hessian_tokens`)."""

from __future__ import annotations

import torch
from torch import Tensor

from methods.codecs.error_feedback import prepare

VERSION = 2  # of what errors under feedback cost; 1 took pivots as they were measured
LEAST = 1e-3  # share of the tokens that are taken to be left over at least, and of a slope: fp32 knows no less


def measure_version(measure: str) -> dict[str, int]:
    """What keys hold of the way a sensitivity is measured: nothing as long as it was always this."""
    return {"measure": VERSION} if measure == "feedback" else {}


def pivots(mean_II: Tensor, tokens: int, damp: float) -> Tensor:
    """Pivots [I], by column, of the Hessian of all text, from the mean of x x^T over `tokens` tokens, with a damping of
    `damp` times the mean of its diagonal. At most what an error costs when nothing reacts to it.

    Raises as `prepare` does."""
    feedback = prepare(mean_II, act_order=True, damp=damp)
    upper_II = feedback.upper_II
    damping = feedback.damp / (1 + feedback.damp) * feedback.diagonal_I.mean()
    square_I = upper_II.square().sum(dim=1)  # summed over p: tr H_p^-1
    product_II = (upper_II @ upper_II.t()).square_()  # summed over p, p: tr H_p^-2
    product_I = 2 * product_II.triu_().sum(dim=1) - product_II.diagonal()
    live_I = mean_II.diagonal()[feedback.order_I] != 0  # the others fit nothing
    fitted_I = _from(live_I * (1 - damping * square_I))  # f
    falls_I = _from(live_I * (damping * square_I - damping**2 * product_I))  # -df / dlog damp
    left_I = (tokens - fitted_I).clamp_min(LEAST * tokens)
    ratio_I = tokens / left_I  # kappa / damp
    steep_I = (1 - falls_I / left_I).clamp(LEAST, 1)  # dlog kappa / dlog damp
    # dlog pivot / dlog kappa, from that of what is measured.
    share_I = (1 - (1 - damping * square_I) / steep_I).clamp(0, 1)
    pivot_I = ratio_I / upper_II.diagonal().square() * (1 - (1 - 1 / ratio_I) * share_I)
    by_column_I = torch.empty_like(pivot_I).index_copy_(0, feedback.order_I, pivot_I)
    return torch.minimum(by_column_I, feedback.diagonal_I)


def _from(values_I: Tensor) -> Tensor:
    """The sum from each place to the end."""
    return values_I.double().flip(0).cumsum(0).flip(0).to(values_I.dtype)
