"""Compression methods. Adding one is adding a file or folder here and one line to REGISTRY."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from typing import Any, get_args

from methods.base import Method

# Resolved on first use: a missing optional dependency breaks only its own method.
REGISTRY: dict[str, str] = {
    "fp16": "methods.fp16:Half",
    "rtn": "methods.rtn:RoundToNearest",
    "nf": "methods.nf:NormalFloat",
    "gptq": "methods.gptq:GPTQ",
    "gptvq": "methods.gptvq:GPTVQ",
    "reallm": "methods.reallm:ReALLM",
    "qlora": "methods.qlora:QLoRA",
    "gptq-lora": "methods.gptq_lora:GPTQLoRA",
    "lq-lora": "methods.lq_lora:LQLoRA",
    "fp16-lora": "methods.fp16_lora:HalfLoRA",
}


def method_class(name: str) -> type[Method]:
    if name not in REGISTRY:
        near = difflib.get_close_matches(name, REGISTRY, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"choose from {', '.join(REGISTRY)}"
        raise ValueError(f"unknown method '{name}': {hint}")
    module, _, attribute = REGISTRY[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def parse_method(text: str) -> Method:
    """`gptq`, `reallm:data-free` (a variant), `gptq:group=64,act_order=false` (overrides), or both, comma-separated.

    Raises ValueError naming the nearest variant, key or value.
    """
    name, _, options = text.strip().partition(":")
    cls = method_class(name)
    values: dict[str, Any] = {}
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for option in filter(None, (part.strip() for part in options.split(","))):
        key, equals, value = option.partition("=")
        known = fields if equals else cls.variants
        if key not in known:
            what = "option" if equals else "variant"
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"{name} has {', '.join(known) or 'none'}"
            raise ValueError(f"method '{name}' has no {what} '{key}': {hint}")
        values |= {key: _parse_value(text, fields[key], value)} if equals else cls.variants[key]
    try:
        return cls(**values)
    except (ValueError, AssertionError) as error:
        raise ValueError(f"method '{text}': {error}") from error


def split_methods(text: str) -> list[str]:
    """Split a comma list of methods whose own options may hold commas: a new method starts at every registered name."""
    items: list[str] = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        is_option = items and ":" in items[-1] and part.partition(":")[0] not in REGISTRY
        if is_option:
            items[-1] += f",{part}"
        else:
            items.append(part)
    return items


def _parse_value(text: str, field: dataclasses.Field, value: str) -> Any:
    lowered = value.lower()
    annotation = _ANNOTATIONS[field.type]
    choices = get_args(annotation) or (annotation,)
    if type(None) in choices and lowered in ("none", "auto"):
        return None
    if bool in choices and lowered in ("true", "false"):
        return lowered == "true"
    for kind in (int, float):
        if kind in choices:
            try:
                return kind(value)
            except ValueError:
                pass
    if str in choices:
        return value
    wanted = " or ".join("none" if c is type(None) else "true/false" if c is bool else c.__name__ for c in choices)
    raise ValueError(f"method '{text}': {field.name}={value} is not {wanted}")


_ANNOTATIONS: dict[str, Any] = {
    "bool": bool,
    "int": int,
    "float": float,
    "str": str,
    "int | None": int | None,
    "str | None": str | None,
    "float | None": float | None,
    "bool | None": bool | None,
}
