"""The control row of the fine-tuned track: the uncompressed model with adapters trained like everybody's.

Tuning a model on web text moves it towards web text, compressed or not. What a fine-tuned row gains beyond its
compression is to be read against this one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from methods.adapted import Adapted
from methods.fp16 import Half


@dataclass(frozen=True, kw_only=True)
class HalfLoRA(Adapted, Half):
    """The uncompressed model with adapters that start at zero."""

    name: ClassVar[str] = "fp16-lora"
    version: ClassVar[int] = 1
