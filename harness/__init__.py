"""Compare post-training quantisation methods for language models under one stored-bit budget."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.portal.hook import announce

if TYPE_CHECKING:
    from harness.api import Leaderboard, compare, compress, load_results

__version__ = "0.1.0"
__all__ = ["Leaderboard", "__version__", "compare", "compress", "load_results"]


def __getattr__(name: str) -> Any:
    """What harness.api offers, imported when it is first asked for: torch and pandas take seconds."""
    if name not in __all__:
        raise AttributeError(f"module 'harness' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module("harness.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


announce()  # our exports to transformers, once that is imported
