"""The keys that cells had before keys left out defaults, so that results in older caches are found again.

A key then held every option of a method's class, ReALLM's five algorithms and GPTVQ being one class. What a method
stores has not changed since as long as its version, and that of every codec it uses, is the one listed here."""

from __future__ import annotations

import os
from collections.abc import Iterable

from harness.data.files import cache_dir
from harness.plan.cells import Cell
from harness.progress import Say
from harness.store.lease import lease
from methods.base import Method, Option

_UNIFORM: dict[str, Option] = dict(bits=None, group=None, offset=None)
_GPTQ: dict[str, Option] = _UNIFORM | dict(
    grid="hessian", act_order=True, static_groups=True, true_sequential=True, damp=0.05
)
_NF: dict[str, Option] = dict(bits=None, block=None)
_ADAPTED: dict[str, Option] = dict(rank=None, adapter_bits=8, dora=False, lora_rate=0.003)
_REALLM: dict[str, Option] = dict(
    calibrated=True,
    dim=None,
    index_bits=None,
    rank=None,
    block=None,
    scales="double",
    along="rows",
    adapter_bits=8,
    band=0,
    order_bits=None,
    row_scales=False,
    rounds=10,
    tolerance=0.001,
    act_order=True,
    damp=0.1,
    refit=6,
    follow=0.5,
    decoder="identity",
    share="kind",
    epochs=0,
    rate=0.004,
    batch=1,
    finetune=False,
    lora_rate=0.0003,
)
# (method, algorithm) -> version, and every option by its default.
_OPTIONS: dict[tuple[str, str], tuple[int, dict[str, Option]]] = {
    ("fp16", ""): (1, dict(dtype="float16")),
    ("rtn", ""): (1, _UNIFORM | dict(grid="minmax")),
    ("nf", ""): (1, _NF),
    ("gptq", ""): (1, _GPTQ),
    ("gptvq", ""): (1, _REALLM | dict(rank=0, share="none", follow=0.0)),
    ("reallm", ""): (3, _REALLM),
    ("reallm", "data-free"): (3, _REALLM | dict(calibrated=False)),
    ("reallm", "released"): (3, _REALLM | dict(calibrated=False, share="none")),
    ("reallm", "blockwise"): (3, _REALLM),
    ("reallm", "finetuned"): (3, _REALLM | dict(finetune=True)),
    ("qlora", ""): (1, _NF | _ADAPTED),
    ("gptq-lora", ""): (1, _GPTQ | _ADAPTED),
    ("fp16-lora", ""): (1, _ADAPTED | dict(dtype="float16")),
}
_VALUES = {("share", "role"): "kind"}  # what a value was called


def earlier_key(cell: Cell) -> str | None:
    """The key that the same cell had in an older cache; None for an option or a method there was not."""
    identity = earlier_identity(cell.method)
    return None if identity is None else cell.key_with(identity)


def earlier_identity(method: Method) -> dict[str, object] | None:
    """What an older key held of this method; None for an option or a method there was not."""
    version, options = _OPTIONS.get((method.name, method.algorithm), (0, {}))
    if not version or not method.changed.keys() <= options.keys():
        return None
    now = {name: getattr(method, name) for name in options if hasattr(method, name)}
    now = {name: _VALUES.get((name, value), value) for name, value in now.items()}
    return {"method": method.name, "version": version, **options, **now}


def same_bytes(method: Method) -> bool:
    """Whether the method, and all shared code it uses, still stores what it stored then."""
    identity = method.identity()
    return "codecs" not in identity and identity["version"] == _OPTIONS[method.name, method.algorithm][0]


def adopt(cells: Iterable[Cell], say: Say) -> None:
    """Rename what an older cache holds of these cells, so that they are found; say where it would be other bytes."""
    for cell in cells:
        earlier = earlier_key(cell)
        if earlier is None:
            continue
        old, new = cache_dir("cells", earlier), cache_dir("cells", cell.key)
        if not old.is_dir() or new.exists():
            continue
        if not same_bytes(cell.method):
            say(f"{cell.label}: an earlier version stored other bytes for it ({old}); it is made again")
            continue
        with lease(old):  # nobody is at work on it
            if old.is_dir() and not new.exists():
                os.rename(old, new)
                say(f"{cell.label}: found under the key of an earlier version ({earlier})")
