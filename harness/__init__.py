"""Compare post-training quantisation methods for language models under one stored-bit budget.

    from harness import compare, compress, load_results

`import harness` alone loads nothing heavy; see docs/python.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["__version__", "compare", "compress", "load_results"]

if TYPE_CHECKING:
    from harness.api import compare as compare
    from harness.api import compress as compress
    from harness.api import load_results as load_results


def __getattr__(name: str) -> object:
    if name in __all__:
        from harness import api

        return getattr(api, name)
    raise AttributeError(f"module 'harness' has no attribute '{name}'")
