"""`PackedLinear`: the one object that is stored, counted, scored and timed.

A format declares its buffers (never parameters that only exist in memory) and how to decode them; its constructor takes
shapes and enums alone, so the same class laid out on the meta device tells how many bits a configuration *will* take, and
laid out on a real device receives the tensors of a checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

PARTS = ("codes", "scales", "tables", "adapters")


@dataclass(frozen=True)
class StoredBits:
    """Bits of stored tensors, by what they are for. Padding is counted where it is stored."""

    codes: int = 0  # indices of weights, nothing else
    scales: int = 0  # scales, zero points, minima, per-row factors
    tables: int = 0  # codebooks, decoders, permutations
    adapters: int = 0  # low-rank factors and their scales

    @property
    def total(self) -> int:
        return self.codes + self.scales + self.tables + self.adapters

    def __add__(self, other: StoredBits) -> StoredBits:
        return StoredBits(*(getattr(self, part) + getattr(other, part) for part in PARTS))


class StoredModule(nn.Module):
    """A module whose buffers keep the dtype they are stored in.

    `.to(dtype)`, `.half()` and friends move the device and nothing else: converting a stored tensor would make the object
    that is scored another one than the object that was counted.
    """

    part_of: ClassVar[dict[str, str]] = {}  # buffer name -> one of PARTS; a buffer that is not listed is not a weight (bias)

    def _apply(self, fn, recurse: bool = True):
        device = fn(torch.empty(0, device=self._device())).device
        return super()._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device), recurse)

    def _device(self) -> torch.device:
        tensor = next((b for b in self.buffers()), None)
        return tensor.device if tensor is not None else torch.device("cpu")

    def stored_parts(self) -> dict[str, str]:
        """Name of every stored weight tensor (dotted, relative to this module) -> the part it is counted under."""
        own = {n: self.part_of[n] for n, b in self.named_buffers(recurse=False) if b is not None and n in self.part_of}
        for child_name, child in self.named_children():
            own |= {f"{child_name}.{name}": part for name, part in child.stored_parts().items()}
        return own

    def stored_bits(self) -> StoredBits:
        bits = dict.fromkeys(PARTS, 0)
        for name, part in self.stored_parts().items():
            tensor = self.get_buffer(name)
            bits[part] += 8 * tensor.numel() * tensor.element_size()
        return StoredBits(**bits)


FORMATS: dict[str, type[PackedLinear]] = {}


class PackedLinear(StoredModule):
    """y = x @ decode().T + bias, on stored tensors only.

    Subclasses set `format`, register buffers in `__init__` from plain shapes and enums, and implement `decode`.
    """

    format: ClassVar[str]
    table_key: str = ""  # of the shared table it decodes from (kernels.tables)
    decode_on_load: ClassVar[bool] = False  # True: `loaded(dtype)` decodes once and keeps the weight

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        assert cls.format not in FORMATS, cls.format
        FORMATS[cls.format] = cls

    def __init__(self, in_features: int, out_features: int, bias: bool, **hyper: Any) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self._hyper = dict(in_features=in_features, out_features=out_features, bias=bias, **hyper)
        # Biases stay at 16 bits for every method and are reported with the norms, outside the bits per weight.
        self.register_buffer("bias", torch.empty(out_features, dtype=torch.float16) if bias else None)

    def spec(self) -> dict[str, Any]:
        """Shapes and enums (JSON) from which `from_spec` lays out an empty module of the same buffers."""
        return {"format": self.format, **self._hyper}

    @staticmethod
    def from_spec(spec: dict[str, Any], device: str | torch.device = "meta") -> PackedLinear:
        import kernels.formats  # noqa: F401  registers the formats; they import this module

        hyper = dict(spec)
        cls = FORMATS[hyper.pop("format")]
        with torch.device(device):
            return cls(**hyper)

    def fill(self, **tensors: Tensor) -> None:
        """Set all stored buffers, insisting on the declared shapes and dtypes: what was planned is what is stored."""
        missing = self.stored_parts().keys() - tensors
        assert not missing, f"{self.format}: {sorted(missing)} left without a value"
        self.refill(**tensors)

    def refill(self, **tensors: Tensor) -> None:
        """Set some of them."""
        for name, value in tensors.items():
            declared = self.get_buffer(name)
            assert value.shape == declared.shape and value.dtype == declared.dtype, (
                f"{self.format}.{name}: {tuple(value.shape)} {value.dtype}, laid out as {tuple(declared.shape)} {declared.dtype}"
            )
            owner, _, leaf = name.rpartition(".")
            setattr(self.get_submodule(owner), leaf, value.contiguous())

    def set_bias(self, bias_O: Tensor | None) -> None:
        assert (bias_O is None) == (self.bias is None)
        if bias_O is not None:
            self.bias = bias_O.detach().to(self.bias.dtype)

    @property
    def resident_bits(self) -> int:
        """Bits held while decoding: the stored tensors and any lossless re-layout made at load time."""
        return sum(8 * b.numel() * b.element_size() for name, b in self.named_buffers() if name != "bias")

    def attach(self, table: nn.Module) -> None:
        """Give the layer the shared table that `table_key` names."""
        raise AssertionError(f"{type(self).__name__} shares no table")

    def decode(self) -> Tensor:
        """The weight these bytes stand for: fp32 [out_features, in_features]."""
        raise AssertionError(f"{type(self).__name__} must define decode()")

    def forward(self, x: Tensor) -> Tensor:
        from kernels.dispatch import linear

        return linear(self, x)

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in self._hyper.items())
