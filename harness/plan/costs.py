"""What every configuration of every layer is expected to cost: asked of the method, layer by layer, and kept in a file.

An estimate takes seconds a layer and serves every budget, so it is made once for a model, a text and a method.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from statistics import median

from torch import Tensor, nn

from harness.data.files import digest
from harness.data.sealed import believed, read_sealed, write_sealed
from harness.model import Inventory
from harness.model.paging import tensor_of
from harness.model.pair import Base, weight_to_pack
from harness.plan.allocation import alike, sort_of
from harness.progress import Progress, silent
from kernels.formats.layer import LayerConfig, LayerSpec
from methods.base import Method, Sensitivity, layer_seed

SAVE_SECONDS = 20.0  # between two writes of a file of costs


def considered(method: Method, layer: LayerSpec, room: Fraction) -> list[LayerConfig]:
    """Configurations worth an estimate for layers of this role and shape: near `room` bits per weight, or near the most
    the method mixes if that is less, and always the smallest. How near, `Method.reach` says."""
    mixable = list(dict.fromkeys(method.mixed_candidates(layer)))
    every = (*mixable, *method.candidates(layer))
    size: dict[LayerConfig, int] = {config: config.stored_bits(layer).total for config in every}
    least = min((config for config in size if not config.table_key), key=size.__getitem__)
    largest = max((size[config] for config in mixable), default=size[least])
    centre = min(room * layer.weights, Fraction(largest))
    near = [config for config in mixable if abs(size[config] - centre) <= method.reach * layer.weights]
    return near if least in near else [*near, least]


def expected_costs(
    method: Method,
    model: nn.Module,
    stock: Inventory,
    budget: Fraction,
    measured: Mapping[str, Sensitivity],
    seed: int,
    progress: Progress = silent,
    known: CostCache | None = None,
    base: Base | None = None,
) -> dict[str, dict[LayerConfig, float]]:
    """Predicted divergence of every candidate of every layer. A layer that no measured token reached (an expert, say)
    is taken to matter as much as the median layer of its shape, or of all. What `known` holds is not estimated again,
    and what is new is added. With a `base`, what is packed is the difference to it."""
    costs, device = {}, next(model.parameters()).device
    known = known or CostCache(None)
    room = (budget * stock.weights - stock.uncovered_bits) / sum(layer.weights for layer in stock.layers)
    configs_of = {key: considered(method, layer, room) for key, layer in alike(stock).items()}
    for index, layer in enumerate(stock.layers):
        weight_OI = weight_to_pack(tensor_of(model, f"{layer.name}.weight").to(device), layer.name, base)
        sensitivity = measured.get(layer.name) or _median(measured, weight_OI)
        configs = configs_of[sort_of(layer)]
        estimate = partial(method.expected_costs, weight_OI, sensitivity, layer, configs, layer_seed(seed, layer.name))
        costs[layer.name] = known.costs(layer.name, configs, estimate)
        progress("estimate errors", index + 1, len(stock.layers))
    known.save()
    return costs


class CostCache:
    """Estimates kept in a file, so that another budget, or the next attempt, finds them. They are found for the same
    configurations alone: a method may estimate several together, and an allocation must not depend on what was asked
    for before."""

    def __init__(self, path: Path | None) -> None:
        self.path, self._saved = path, time.monotonic()
        self._costs: dict[str, list[float]] = (path and believed(path, read_sealed)) or {}

    def costs(
        self, layer: str, configs: Sequence[LayerConfig], estimate: Callable[[], list[float]]
    ) -> dict[LayerConfig, float]:
        key = digest([layer, [str(config) for config in configs]])[:24]
        if key not in self._costs:
            self._costs[key] = estimate()
            if time.monotonic() - self._saved > SAVE_SECONDS:
                self.save()
        return dict(zip(configs, self._costs[key], strict=True))

    def save(self) -> None:
        if self.path:
            write_sealed(self.path, self._costs)
            self._saved = time.monotonic()


def _median(measured: Mapping[str, Sensitivity], weight_OI: Tensor) -> Sensitivity:
    shape = tuple(weight_OI.shape)
    same_shape = [s for s in measured.values() if (len(s.row_O), len(s.column_I)) == shape] or list(measured.values())
    row, column = (
        median(float(vector.mean()) for vector in vectors)
        for vectors in zip(*((s.row_O, s.column_I) for s in same_shape), strict=True)
    )
    return Sensitivity(weight_OI.new_full(shape[:1], row), weight_OI.new_full(shape[1:], column))
