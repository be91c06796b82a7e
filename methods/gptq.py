"""GPTQ (Frantar, Ashkboos, Hoefler, Alistarh; ICLR 2023, arXiv 2210.17323): uniform grids with error feedback.

    sec. 3.3 step 1   columns in one order for all rows; act-order (released code): by falling diag(H)
    sec. 3.3 step 2   lazy blocks of 128 columns                         methods.codecs.error_feedback.run
    sec. 3.3 step 3   Cholesky factor of the damped H^-1                 methods.codecs.error_feedback.prepare

Settings of the released code: `act_order`, `static_groups` (grids placed on the original columns before the loop;
without it act-order must store its permutation, which is counted), `true_sequential` (later layers of a block see the
packed earlier ones), `grid` (placement by min-max or by a search), `damp`. Defaults were chosen on text used for
nothing else, at equal stored bits (docs/methods.md, "Baselines at their best").

Ingredients that the paper does not have, for our other calibrated methods have them: `follow` (weights take back half
of the drift of their inputs, methods.codecs.drift; all of it and another value for the first column are `gptq:qronos`),
`shrink` (what inputs have in common counts less, methods.codecs.error_feedback) and, when asked for, `rotated` (grids
for rotated inputs, `gptq:rotated`; QuaRot, arXiv 2404.00456, rotates a model).

Divergences: grid parameters are rounded to fp16 before codes are chosen; dead columns keep their weights; the damping
ladder continues where the released code stops with an error; searched symmetric grids may have a negative scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kernels.formats.uniform import UniformLinear
from methods.base import Compressed, LayerConfig, LayerData, LayerSpec, Method, Needs, Sensitivity, Track
from methods.codecs.basis import turned, turned_estimate
from methods.codecs.drift import FOLLOW_DAMP, check_follow, first_column, followed
from methods.codecs.error_feedback import Feedback, check_damp, check_shrink, prepare, run, shrunk
from methods.codecs.feedback_on_grids import codes_on_grids, round_column
from methods.codecs.grids import Grid, fit_grid
from methods.distilled import Distils
from methods.uniform_grid import UniformGridMethod


@dataclass(frozen=True, kw_only=True)
class GPTQ(UniformGridMethod):
    """Error feedback on uniform grids."""

    name: ClassVar[str] = "gptq"
    version: ClassVar[int] = 3  # correlations of inputs are shrunk
    track: ClassVar[Track] = Track.CALIBRATED
    later: ClassVar[tuple[str, ...]] = (*Method.later, "follow", "follow_damp", "qronos", "shrink")

    grid: str = "hessian"
    act_order: bool = True
    static_groups: bool = True
    true_sequential: bool = True
    damp: float = 0.05
    shrink: float = 0.15  # share of every column's own diag(H) added to it
    follow: float = 0.5  # share of the inputs' drift that weights take back
    follow_damp: float = FOLLOW_DAMP
    rotated: bool = False  # weights are packed for turned inputs (kernels.formats.rotation), as QuaRot and trellises do
    qronos: bool = False  # the first column is rounded while all others are what they were

    def __post_init__(self) -> None:
        super().__post_init__()
        check_damp(self.damp)
        check_shrink(self.shrink)
        check_damp(self.follow_damp, "follow_damp")
        check_follow(self.follow)
        if self.rotated and not self.static_groups:
            raise ValueError("rotated=true has no stored order: leave static_groups=false out")
        if self.qronos and not self.follow:
            raise ValueError("qronos=true corrects the drift of inputs, which follow=0 leaves alone: write follow=1")

    @classmethod
    def variants(cls) -> dict[str, Method]:
        return {"rotated": GPTQ(rotated=True), "qronos": GPTQ(follow=1.0, qronos=True), "distilled": Distilled()}

    @property
    def needs(self) -> Needs:
        return Needs(hessian=True, drift=self.follow > 0, true_sequential=self.true_sequential)

    @property
    def packs_differences(self) -> bool:
        return not self.follow  # what inputs drift by, the base multiplies as well: a difference cannot take it back

    @property
    def permuted(self) -> bool:
        return self.act_order and not self.static_groups

    def candidates(self, layer: LayerSpec) -> list[LayerConfig]:
        configs = super().candidates(layer)
        return [config.plus(rotated=True) for config in configs] if self.rotated else configs

    def expected_costs(
        self, weight_OI: Tensor, sensitivity: Sensitivity, layer: LayerSpec, configs: Sequence[LayerConfig], seed: int
    ) -> list[float]:
        if self.rotated:
            weight_OI, sensitivity = turned_estimate(weight_OI, sensitivity, seed)
        return super().expected_costs(weight_OI, sensitivity, layer, configs, seed)

    def compress(self, data: LayerData, layer: LayerSpec, config: LayerConfig) -> Compressed:
        assert data.hessian_II is not None
        packed = config.layout(layer, data.weight_OI.device)
        assert isinstance(packed, UniformLinear)
        weight_OI, hessian_II, rotation = turned(
            packed, data.weight_OI, shrunk(data.hessian_II, self.shrink), data.seed
        )
        drift = None
        if data.drift_II is not None:
            drift_II = data.drift_II if packed.rotation is None else packed.rotation.turn_both(data.drift_II)
            drift = (hessian_II, drift_II, self.follow, self.follow_damp)
        target_OI = followed(weight_OI, *drift) if drift else weight_OI
        feedback = prepare(hessian_II, act_order=self.act_order, damp=self.damp)
        column = int(feedback.order_I[0])
        first_O = first_column(weight_OI, *drift, column) if drift and self.qronos else None
        solve = self._static if self.static_groups else self._dynamic
        codes_OI, grid = solve(target_OI, feedback, packed.bits, packed.group, packed.offset, first_O)
        order_I = feedback.order_I if packed.order is not None else None
        packed.fill(**packed.tensors(codes_OI, **grid.stored, order_I=order_I), **rotation)
        return Compressed(packed, {"dead_columns": feedback.dead, "damp": feedback.damp})

    def _importance(self, feedback: Feedback) -> Tensor:
        """What a grid's search weighs squared errors with, per column."""
        return feedback.pivot_I if self.grid == "pivots" else feedback.diagonal_I

    def _static(
        self, weight_OI: Tensor, feedback: Feedback, bits: int, group: int, offset: str, first_O: Tensor | None
    ) -> tuple[Tensor, Grid]:
        """Grids from the weights before the loop: a column knows its grid whenever its turn comes."""
        importance_I = self._importance(feedback)
        grid = fit_grid(weight_OI, bits=bits, group=group, offset=offset, search=self.grid, importance_I=importance_I)
        columns = weight_OI.shape[1]
        codes_IO = codes_on_grids(weight_OI, feedback, *grid.columns(columns), [2**bits - 1] * columns, first_O)
        return codes_IO.t().to(torch.int32), grid

    def _dynamic(
        self, weight_OI: Tensor, feedback: Feedback, bits: int, group: int, offset: str, first_O: Tensor | None
    ) -> tuple[Tensor, Grid]:
        """Grids from the already updated weights, placed when the loop reaches a group (codes stay in processing
        order)."""
        rows, columns = weight_OI.shape
        importance_I = self._importance(feedback)
        codes_IO = torch.empty(columns, rows, device=weight_OI.device)
        grids: list[Grid] = []

        def enter(position: int, rest_IO: Tensor) -> None:
            columns_I = feedback.order_I[position : position + group]
            grids.append(
                fit_grid(
                    rest_IO[position : position + group].t(),
                    bits=bits,
                    group=len(columns_I),
                    offset=offset,
                    search=self.grid,
                    importance_I=importance_I[columns_I],
                )
            )

        def quantise(position: int, column: int, values_O: Tensor) -> Tensor:
            grid = grids[-1]
            return round_column(values_O, grid.scale_OG[:, 0], grid.base_OG[:, 0], 2**bits - 1, codes_IO[position])

        run(weight_OI, feedback, quantise, block=group, enter=enter, first_O=first_O)
        joined: dict[str, list[Tensor]] = {name: [g.stored[name] for g in grids] for name in grids[0].stored}
        grid = Grid(
            bits,
            group,
            torch.cat([g.scale_OG for g in grids], dim=1),
            torch.cat([g.base_OG for g in grids], dim=1),
            {name: torch.cat(parts, dim=1) for name, parts in joined.items()},
        )
        return codes_IO.t().to(torch.int32), grid


@dataclass(frozen=True, kw_only=True)
class Distilled(Distils, GPTQ):
    """Scales and minima are trained afterwards."""

    version: ClassVar[int] = GPTQ.version + 1  # statistics of all text
