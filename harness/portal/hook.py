"""How `transformers` comes to know our exports without anybody importing it for that.

transformers looks for no plug-ins, and importing it takes seconds, so `import harness` only leaves word: when the
module that lists quantizers has been imported (or already was), ours is added to it. Of all that `lm_eval` and the like
import, torch alone asks for entry points (group `torch.backends`, of devices); an installed harness has one there that
does the same and nothing else, so that their own command lines load our folders too."""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from harness.portal import QUANT_METHOD

LISTED = "transformers.quantizers.auto"  # the module that lists quantizers


def announce() -> None:
    """Add our quantizer to those of transformers, now or once it is imported. Cheap, and may be called again."""
    module = sys.modules.get(LISTED)
    if module is not None and hasattr(module, "register_quantizer"):
        _register(module)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register(auto: Any) -> None:
    if QUANT_METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        from harness.portal import quantizer

        auto.register_quantization_config(QUANT_METHOD)(quantizer.PackedConfig)
        auto.register_quantizer(QUANT_METHOD)(quantizer.PackedQuantizer)


class _Finder(MetaPathFinder):
    """Finds one module, as Python would, and adds to it."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != LISTED:
            return None
        sys.meta_path.remove(self)
        found = PathFinder.find_spec(fullname, path, target)
        if found is not None and found.loader is not None:
            found.loader = _Then(found.loader)
        return found


class _Then(Loader):
    """Another loader, and then our registration."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _register(module)

    def __getattr__(self, name: str) -> Any:  # what the other has beside: source, resources
        return getattr(self._loader, name)
