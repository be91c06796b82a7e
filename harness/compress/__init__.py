"""The block loop, the statistics it collects, and training.

Called, it is `harness.api.compress`: a package takes its name in `harness` once any module of it is imported, and
`harness.compress(model, "gptq")` means the same before and after."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _Called(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return import_module("harness.api").compress(*arguments, **options)


sys.modules[__name__].__class__ = _Called
