"""Exact low-rank factors of a matrix: the best ones for its own error, or for that of its outputs, and those of the
principal components of its outputs. All take a leading part: the first R components of many are the best R."""

from __future__ import annotations

import torch
from torch import Tensor

from methods.codecs.error_feedback import DAMP_LADDER, Indefinite, NotFinite


def best_factors(matrix_OI: Tensor, whitener_II: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(left [O, R], right [R, I]), R = min(O, I), whose leading r components minimise ||(matrix - left @ right) C||_F;
    C is the identity, or the lower Cholesky factor of H = C C^T (SVD-LLM, arXiv 2403.07378, theorem 3.2).

    With S = matrix @ C and U, V its singular vectors, S cut to r components is U_r U_r^T S = S V_r V_r^T: an
    eigenproblem of the shorter side, in fp64, and of C^-1 only what V_r^T C^-1 asks for."""
    seen_OI = matrix_OI.double()
    lower_II = None if whitener_II is None else whitener_II.double()
    if lower_II is not None:
        seen_OI = seen_OI @ lower_II
    if len(seen_OI) < seen_OI.shape[1]:
        u_OR = falling_eigenvectors(seen_OI @ seen_OI.t())
        return balanced(u_OR, u_OR.t() @ matrix_OI.double())
    v_IR = falling_eigenvectors(seen_OI.t() @ seen_OI)
    right_RI = v_IR.t()
    if lower_II is not None:
        right_RI = torch.linalg.solve_triangular(lower_II, right_RI, upper=False, left=False)
    return balanced(seen_OI @ v_IR, right_RI)


def principal_factors(matrix_OI: Tensor, covariance_II: Tensor) -> tuple[Tensor, Tensor]:
    """(left [O, R], right [R, I]) by the principal components Q of the outputs y = W x, whose covariance is
    W covariance W^T: left = Q, right = Q^T W (Bolaco, arXiv 2405.10616, sec. 3.1)."""
    basis_OR, inner_RI = torch.linalg.qr(matrix_OI.double())  # outputs have no component outside the range of W
    outputs_RR = inner_RI @ covariance_II.double() @ inner_RI.t()
    q_OR = basis_OR @ falling_eigenvectors((outputs_RR + outputs_RR.t()) / 2)
    return balanced(q_OR, q_OR.t() @ matrix_OI.double())


def falling_eigenvectors(gram: Tensor) -> Tensor:
    """Eigenvectors of a symmetric matrix as columns, by falling eigenvalue, each with its largest entry positive."""
    vectors = torch.linalg.eigh(gram).eigenvectors.flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)


def balanced(left_OR: Tensor, right_RI: Tensor) -> tuple[Tensor, Tensor]:
    """The same product in fp32, both sides of a component of one norm: what is in range of 16 bits, and has numbers of
    one size for training."""
    left_R, right_R = left_OR.norm(dim=0), right_RI.norm(dim=1)
    ratio_R = torch.where((left_R > 0) & (right_R > 0), (right_R / left_R.clamp_min(1e-300)).sqrt(), 1.0)
    return (left_OR * ratio_R).float(), (right_RI / ratio_R[:, None]).float()


def whitener(hessian_II: Tensor, damp: float) -> Tensor:
    """The lower Cholesky factor of H with `damp` of mean diag(H) added, or ten times as much, and so on.

    A column without input weighs as much as the mean. Raises NotFinite, or Indefinite when no damping helps."""
    if not bool(torch.isfinite(hessian_II).all()):
        raise NotFinite("the Hessian of this layer is not finite: the model overflows on the calibration text")
    damped_II = hessian_II.double()
    diagonal_I = damped_II.diagonal()
    mean = diagonal_I[diagonal_I > 0].mean() if bool((diagonal_I > 0).any()) else diagonal_I.new_ones(())
    diagonal_I[diagonal_I <= 0] = mean
    before_I = diagonal_I.clone()
    for attempt in range(DAMP_LADDER):
        diagonal_I.copy_(before_I + damp * 10**attempt * mean)
        lower_II, info = torch.linalg.cholesky_ex(damped_II)
        if info == 0:
            return lower_II
    raise Indefinite("the Hessian of this layer is not positive definite even with strong damping")
