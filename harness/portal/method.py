"""The method of rows whose bytes another program made: nothing here can make them again, and a file can be one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from methods.base import Compressed, LayerConfig, LayerData, LayerSpec, Method, Track


@dataclass(frozen=True, kw_only=True)
class Imported(Method):
    """A checkpoint of this format and content (harness.portal.incoming)."""

    name: ClassVar[str] = "imported"
    version: ClassVar[int] = 1
    track: ClassVar[Track] = Track.IMPORTED
    budgeted: ClassVar[bool] = False
    seeded: ClassVar[bool] = False

    format: str = ""
    sha256: str = ""  # its first digits

    def candidates(self, layer: LayerSpec) -> list[LayerConfig]:
        raise AssertionError("what a checkpoint stores is not chosen here")

    def compress(self, data: LayerData, layer: LayerSpec, config: LayerConfig) -> Compressed:
        raise AssertionError("a checkpoint is compressed already")
