"""Compression methods. Adding one is adding a file or folder here and one line to METHODS, or an entry point of the
group `ptq_harness.methods` in another package.

A package outside imports what it needs from here and from `methods.base`: in an installed wheel our kernels have
another name."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from kernels.registry import Registry, on_demand, suggestion

__all__ = [
    "METHODS",
    "Adaptation",
    "Compressed",
    "LayerConfig",
    "LayerData",
    "LayerSpec",
    "Method",
    "Needs",
    "Sensitivity",
    "Track",
    "parse_method",
    "split_methods",
]

if TYPE_CHECKING:
    from methods.base import (
        Adaptation,
        Compressed,
        LayerConfig,
        LayerData,
        LayerSpec,
        Method,
        Needs,
        Sensitivity,
        Track,
    )
else:  # they bring torch, which the names of methods do without
    __getattr__ = on_demand("methods.base", __all__)

# Each entry is the class of a method's default configuration.
METHODS: Registry[type[Method]] = Registry(
    "method",
    "methods.base:Method",
    {
        "fp16": "methods.fp16:Half",
        "rtn": "methods.rtn:RoundToNearest",
        "nf": "methods.nf:NormalFloat",
        "hqq": "methods.hqq:HQQ",
        "awq": "methods.awq:AWQ",
        "gptq": "methods.gptq:GPTQ",
        "gptq-ref": "methods.gptq_ref:Reference",
        "gptvq": "methods.gptvq:GPTVQ",
        "trellis": "methods.trellis:Trellis",
        "reallm": "methods.reallm.calibrated:Calibrated",
        "qlora": "methods.qlora:QLoRA",
        "gptq-lora": "methods.gptq_lora:GPTQLoRA",
        "lq-lora": "methods.lq_lora:LQLoRA",
        "qllm": "methods.qllm:QLLM",
        "svd": "methods.svd:SVD",
        "mpo": "methods.mpo:MPO",
        "bolaco": "methods.bolaco:Bolaco",
        "delta-come": "methods.delta_come:DeltaCoMe",
        "bitdelta": "methods.bitdelta:BitDelta",
        "base": "methods.base_alone:BaseAlone",
        "fp16-lora": "methods.fp16_lora:HalfLoRA",
    },
    group="ptq_harness.methods",
)


def parse_method(text: str) -> Method:
    """`gptq`, `reallm:data-free` (a variant), `gptq:group=64,act_order=false` (options), or both, comma-separated.

    Raises ValueError naming the nearest variant, option or value.
    """
    name, _, rest = text.strip().partition(":")
    parts = [part.strip() for part in rest.split(",") if part.strip()]
    method = METHODS.get(name)()
    for variant in (part for part in parts if "=" not in part):
        variants = method.variants()
        if variant not in variants:
            raise ValueError(f"method '{name}' has no variant '{variant}': {suggestion(variant, variants)}")
        method = variants[variant]
    values: dict[str, Any] = {}
    hints = get_type_hints(type(method))
    options = [option.name for option in dataclasses.fields(method)]
    for part in (part for part in parts if "=" in part):
        key, _, value = part.partition("=")
        if key not in options:
            raise ValueError(
                f"method '{name}' has no option '{key}': {_where(key, method) or suggestion(key, options)}"
            )
        values[key] = _parse_value(text, key, hints[key], value)
    try:
        return dataclasses.replace(method, **values)
    except (ValueError, AssertionError) as error:
        raise ValueError(f"method '{text}': {error}") from error


def _where(key: str, method: Method) -> str:
    """Which variants of the method have an option that this one has not; "" for none."""
    owners = [f"{method.name}:{name}" for name, other in method.variants().items() if hasattr(other, key)]
    return f"it belongs to {' and '.join(filter(None, (', '.join(owners[:-1]), owners[-1])))}" if owners else ""


def split_methods(text: str) -> list[str]:
    """Split a comma list of methods whose own options may hold commas: a new method starts at every registered name."""
    items: list[str] = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        is_option = items and ":" in items[-1] and part.partition(":")[0] not in METHODS
        if is_option:
            items[-1] += f",{part}"
        else:
            items.append(part)
    return items


def _parse_value(text: str, key: str, annotation: Any, value: str) -> Any:
    """The value of an option of type bool, int, float or str, or a union of some of them and None."""
    lowered = value.strip().lower()
    choices = get_args(annotation) or (annotation,)
    if type(None) in choices and lowered in ("none", "auto"):
        return None
    if bool in choices and lowered in ("true", "false"):
        return lowered == "true"
    for number in (int, float):
        if number in choices:
            try:
                return number(value)
            except ValueError:
                pass
    if str in choices:
        return value
    names = {type(None): "none", bool: "true/false"}
    wanted = " or ".join(names.get(choice) or choice.__name__ for choice in choices)
    raise ValueError(f"method '{text}': {key}={value} is not {wanted}")
