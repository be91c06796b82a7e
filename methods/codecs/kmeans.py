"""Weighted k-means over short vectors: seeded, vectorised, with no cluster left empty."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1 << 20  # distances held at once: 4 MiB, near what a core's cache holds


class NearestEntry:
    """argmin_k sum_d (square c_k^2 - 2 cross c_k), int64 [N]: the nearest entry under weights w for square = w, cross =
    w v.

    A weight that comes of a scale, w = s^2 and v = x / s, needs no division this way: cross = s x. One product per
    chunk, into a buffer that is kept from call to call: on a CPU fresh pages for the distances cost more than the
    distances."""

    def __init__(self, codebook_KD: Tensor) -> None:
        self.terms_EK = torch.cat([codebook_KD.square(), -2 * codebook_KD], dim=1).t().contiguous()
        self._distance_NK: Tensor | None = None

    def __call__(self, square_ND: Tensor, cross_ND: Tensor) -> Tensor:
        both_NE = torch.cat([square_ND, cross_ND], dim=1)
        count = self.terms_EK.shape[1]
        step = min(len(both_NE), max(1, CHUNK // count))
        if self._distance_NK is None or len(self._distance_NK) < step:
            self._distance_NK = both_NE.new_empty(step, count)
        found = [
            _argmin(torch.mm(part, self.terms_EK, out=self._distance_NK[: len(part)])) for part in both_NE.split(step)
        ]
        return found[0] if len(found) == 1 else torch.cat(found)


def nearest(square_ND: Tensor, cross_ND: Tensor, codebook_KD: Tensor) -> Tensor:
    """One call of `NearestEntry`."""
    return NearestEntry(codebook_KD)(square_ND, cross_ND)


def _argmin(distance_NK: Tensor) -> Tensor:
    """argmin over K. NumPy's is vectorised and 3 to 18 times as fast as torch's on a CPU (K = 64, 256)."""
    return distance_NK.argmin(dim=1) if distance_NK.is_cuda else torch.from_numpy(distance_NK.numpy().argmin(axis=1))


def kmeans(
    vector_ND: Tensor, weight_ND: Tensor, count: int, *, seed: int, iterations: int = 25, start_KD: Tensor | None = None
) -> Tensor:
    """A codebook [count, D] that locally minimises sum weight (vector - codebook[nearest])^2.

    Starts from `start_KD`, or from k-means++ (Arthur & Vassilvitskii, SODA 2007). Clusters that lose all
    their vectors are restarted at the vectors that are served worst. Stops early when the assignment no longer changes.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    codebook_KD = _plus_plus(vector_ND, weight_ND, count, generator) if start_KD is None else start_KD.clone()
    previous_N: Tensor | None = None
    cross_ND = weight_ND * vector_ND
    for _ in range(iterations):
        code_N = nearest(weight_ND, cross_ND, codebook_KD)
        if previous_N is not None and torch.equal(code_N, previous_N):
            break
        previous_N = code_N
        codebook_KD = centroids(vector_ND, weight_ND, code_N, codebook_KD)
    return codebook_KD


def centroids(vector_ND: Tensor, weight_ND: Tensor, code_N: Tensor, codebook_KD: Tensor) -> Tensor:
    """Weighted means of the clusters; an empty one moves to a vector with a large error."""
    mass_KD = torch.zeros_like(codebook_KD).index_add_(0, code_N, weight_ND)
    moment_KD = torch.zeros_like(codebook_KD).index_add_(0, code_N, weight_ND * vector_ND)
    updated_KD = torch.where(mass_KD > 0, moment_KD / mass_KD.clamp_min(torch.finfo(mass_KD.dtype).tiny), codebook_KD)
    empty_K = (mass_KD.sum(dim=1) == 0).nonzero().squeeze(1)
    if len(empty_K):
        error_N = (weight_ND * (vector_ND - updated_KD[code_N]).square()).sum(dim=1)
        worst_N = error_N.topk(min(len(empty_K), len(error_N))).indices
        updated_KD[empty_K[: len(worst_N)]] = vector_ND[worst_N]
    return updated_KD


def _plus_plus(vector_ND: Tensor, weight_ND: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Each next centre is drawn with probability proportional to its weighted squared distance to those chosen."""
    pool = min(len(vector_ND), 32 * count)
    picked = torch.randperm(len(vector_ND), generator=generator)[:pool].to(vector_ND.device)
    vector_ND, weight_ND = vector_ND[picked], weight_ND[picked]
    codebook_KD = vector_ND.new_empty(count, vector_ND.shape[1])
    distance_N = torch.full((len(vector_ND),), torch.inf, device=vector_ND.device)
    uniform_K = torch.rand(count, generator=generator).tolist()
    index = int(uniform_K[0] * len(vector_ND))
    for k in range(count):
        codebook_KD[k] = vector_ND[index]
        distance_N = torch.minimum(distance_N, (weight_ND * (vector_ND - codebook_KD[k]).square()).sum(dim=1))
        if k + 1 < count:
            cumulative_N = distance_N.cumsum(0, dtype=torch.float64)
            target = cumulative_N[-1:] * uniform_K[k + 1]
            index = min(int(torch.searchsorted(cumulative_N, target)), len(vector_ND) - 1)
    return codebook_KD
