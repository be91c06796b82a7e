"""`PackedLinear`: the one object that is stored, counted, scored and timed; `FORMATS`: its subclasses by name.

A format declares its buffers (never parameters that only exist in memory) and how to decode them; its constructor takes
shapes and enums alone, so the same class laid out on the meta device tells how many bits a configuration *will* take,
and laid out on a real device receives the tensors of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kernels.dispatch import linear
from kernels.formats.activations import quantised
from kernels.formats.bits import ACT_BITS, FULL, Scalar, Spec
from kernels.formats.lowrank import LowRank, quantise_lowrank
from kernels.formats.reassembly import Reassembly
from kernels.formats.rotation import Rotation
from kernels.formats.stored import StoredModule
from kernels.registry import Registry


class PackedLinear(StoredModule):
    """y = x @ decode().T + bias, on stored tensors only.

        weight = (base + left @ right) * row_scale,   base = what the codes decode to, turned back if inputs are turned

    Any format may add the low-rank part (`rank`) and one factor per row (`row_scales`, DoRA's magnitudes) to its base,
    and pack its weight for inputs that are turned first: rotated (`rotated`) or reassembled (`reassembled`). Inputs of
    fewer than 16 bits (`act_bits`) are rounded where the base is multiplied with them, after all that is done to them;
    the low-rank part sees them as they come. Subclasses set `format`, register the buffers of the base in
    `__init__` from plain shapes and enums, and implement `decode_codes`."""

    format: ClassVar[str]  # its name in FORMATS
    table_key: str = ""  # of the shared table it decodes from (kernels.formats.tables)
    takes_act_bits: ClassVar[bool] = True  # False: it has no base whose inputs could be rounded
    decode_on_load: ClassVar[bool] = False  # True: `loaded(dtype)` decodes once and keeps the weight
    part_of: ClassVar[dict[str, str]] = {"row_scale": "scales"}
    row_scale: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        *,
        rank: int = 0,
        adapter_bits: int = 8,
        row_scales: bool = False,
        rotated: bool = False,
        reassembled: bool = False,
        act_bits: int = FULL,
        **hyper: Any,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        shape = dict(in_features=in_features, out_features=out_features, bias=bias)
        self._hyper = shape | dict(rank=rank, adapter_bits=adapter_bits, row_scales=row_scales) | hyper
        # Absent rather than false: a layer without them is described as it was before there were any.
        self._hyper |= {name: True for name, has in (("rotated", rotated), ("reassembled", reassembled)) if has}
        self.act_bits = FULL
        if act_bits != FULL:
            self.round_inputs(act_bits)
        assert not (rotated and reassembled) and not (reassembled and rank)
        self.rotation = Rotation(in_features) if rotated else None
        self.reassembly = Reassembly(in_features) if reassembled else None
        self.lowrank = LowRank(in_features, out_features, rank, adapter_bits) if rank else None
        self.register_buffer("row_scale", torch.empty(out_features, dtype=torch.float16) if row_scales else None)
        # Biases stay at 16 bits for every method and are reported with the norms, outside the bits per weight.
        self.register_buffer("bias", torch.empty(out_features, dtype=torch.float16) if bias else None)

    def spec(self) -> Spec:
        """Shapes and enums (JSON) from which `from_spec` lays out an empty module of the same buffers."""
        return {"format": self.format, **self._hyper}

    @staticmethod
    def from_spec(spec: Mapping[str, Scalar], device: str | torch.device = "meta") -> PackedLinear:
        """An empty layer of this description; its format may be one of another package."""
        hyper: dict[str, Any] = dict(spec)
        cls = FORMATS.get(hyper.pop("format"))
        with torch.device(device):
            return cls(**hyper)

    def fill(self, **tensors: Tensor) -> None:
        """Set all stored buffers, insisting on the declared shapes and dtypes: what was planned is what is stored.
        Where nothing is said of the low-rank part or of row scales, they are to be trained, and start without
        effect."""
        if self.lowrank is not None and not any(name.startswith("lowrank.") for name in tensors):
            tensors |= {f"lowrank.{name}": torch.zeros_like(buffer) for name, buffer in self.lowrank.named_buffers()}
        if self.row_scale is not None and "row_scale" not in tensors:
            tensors["row_scale"] = torch.ones_like(self.row_scale)
        missing = self.stored_parts().keys() - tensors
        assert not missing, f"{self.format}: {sorted(missing)} left without a value"
        self.refill(**tensors)

    def refill(self, **tensors: Tensor) -> None:
        """Set some of the stored buffers, with the same insistence."""
        for name, value in tensors.items():
            declared = self.get_buffer(name)
            assert value.shape == declared.shape and value.dtype == declared.dtype, (
                f"{self.format}.{name}: {tuple(value.shape)} {value.dtype}, "
                f"laid out as {tuple(declared.shape)} {declared.dtype}"
            )
            owner, _, leaf = name.rpartition(".")
            setattr(self.get_submodule(owner), leaf, value.contiguous())

    def round_inputs(self, bits: int) -> None:
        """Have inputs rounded to so many bits from now on. Raises ValueError for a format that cannot."""
        assert bits in ACT_BITS
        if bits != FULL and not self.takes_act_bits:
            raise ValueError(f"format {self.format} rounds no inputs: write --act-bits {FULL}, or leave it out")
        self.act_bits = bits
        self._hyper.pop("act_bits", None)
        self._hyper |= {"act_bits": bits} if bits != FULL else {}

    @property
    def rounds(self) -> bool:
        """Whether inputs are rounded."""
        return self.act_bits != FULL

    @property
    def constant(self) -> Tensor | None:
        """What is added to every output [O]; None: nothing."""
        return self.bias

    def set_bias(self, bias_O: Tensor | None) -> None:
        """Store a bias [O], rounded to 16 bits; None for a layer laid out without."""
        assert (bias_O is None) == (self.bias is None)
        if bias_O is not None and self.bias is not None:
            self.bias = bias_O.detach().to(self.bias.dtype)

    @property
    def resident_bits(self) -> int:
        """Bits held while decoding: the stored tensors and any lossless re-layout made at load time."""
        return sum(8 * b.numel() * b.element_size() for name, b in self.named_buffers() if name != "bias")

    def attach(self, table: nn.Module) -> None:
        """Give the layer the shared table that `table_key` names."""
        raise AssertionError(f"{type(self).__name__} shares no table")

    def loaded(self, dtype: torch.dtype) -> Tensor:
        """The weight [O, I] in the dtype of a product, decoded once and kept; where `decode_on_load`."""
        raise AssertionError(f"{type(self).__name__} decodes for every product")

    def unload(self) -> None:
        """Let go of what `loaded` keeps."""

    def decode(self) -> Tensor:
        """The weight these bytes stand for: fp32 [out_features, in_features]."""
        factors = self.lowrank.factors() if self.lowrank is not None else None
        return self._whole(self.decode_codes(), factors, self.row_scale)

    def decode_base(self) -> Tensor:
        """The weight without its low-rank part and row scales, fp32 [O, I]."""
        return self.turned_back(self.decode_codes())

    def decode_codes(self) -> Tensor:
        """What the codes stand for, fp32 [O, I]: the base, for rotated inputs where these are."""
        raise AssertionError(f"{type(self).__name__} must define decode_codes()")

    @property
    def turning(self) -> Rotation | Reassembly | None:
        """What is done to inputs first."""
        return self.rotation or self.reassembly

    def turned_back(self, codes_OI: Tensor) -> Tensor:
        """The base of turned inputs, as one of the inputs themselves."""
        return codes_OI if self.turning is None else self.turning.back(codes_OI)

    @property
    def column_factor(self) -> Tensor | None:
        """A number per column [I] that `decode_codes` has in it, and that inputs are multiplied by instead."""
        return None

    def decode_entered(self) -> Tensor:
        """What `entering` is multiplied by, fp32 [O, I]: `decode_codes` without `column_factor`."""
        return self.decode_codes()

    def entering(self, x: Tensor) -> Tensor:
        """What the base is multiplied with, for inputs x [..., I]: turned, scaled, rounded."""
        x = x if self.turning is None else self.turning.turn(x)
        return quantised(x if self.column_factor is None else x * self.column_factor.to(x.dtype), self.act_bits)

    def product_of_rounded(self, x: Tensor) -> Tensor:
        """x [..., I] times the weight, inputs rounded where the base is multiplied with them; without bias. The oracle
        of layers with `act_bits`; differentiable."""
        y = nn.functional.linear(self.entering(x), self.decode_entered().to(x.dtype))
        if self.lowrank is not None:
            left_OR, right_RI = (factor.to(x.dtype) for factor in self.lowrank.factors())
            y = y + x @ right_RI.t() @ left_OR.t()
        return y if self.row_scale is None else y * self.row_scale.to(x.dtype)

    def learnt(self) -> dict[str, Tensor]:
        """The real numbers that are stored, fp32, by name: what training may move while codes stay as they are. Names
        that end in "scale" are those of factors. A rotation's signs and tables of other layers are none of them."""
        numbers = self.base_learnt()
        if numbers and self.lowrank is not None:
            numbers["left"], numbers["right"] = self.lowrank.factors()
        if numbers and self.row_scale is not None:
            numbers["row_scale"] = self.row_scale.float()
        return numbers

    def weight_of(self, learnt: Mapping[str, Tensor], codes: Tensor | None = None) -> Tensor:
        """The weight [O, I] with these in the place of `learnt`; differentiable. `codes` is what `indices` gave, for
        those who ask again and again."""
        factors = (learnt["left"], learnt["right"]) if self.lowrank is not None else None
        base_OI = self.base_of(learnt, self.indices() if codes is None else codes)
        return self._whole(base_OI, factors, learnt.get("row_scale"))

    def relearn(self, learnt: Mapping[str, Tensor]) -> None:
        """Store them, rounded."""
        self.refill(**self.base_tensors(learnt))
        if self.lowrank is not None:
            stored = quantise_lowrank(learnt["left"], learnt["right"], self.lowrank.bits)
            self.refill(**{f"lowrank.{name}": tensor for name, tensor in stored.items()})
        if self.row_scale is not None:
            self.refill(row_scale=learnt["row_scale"].half())

    def base_learnt(self) -> dict[str, Tensor]:
        """Those of `learnt` that `decode_codes` reads; none where a format has no numbers but its codes."""
        return {}

    def indices(self) -> Tensor:
        """What `base_of` makes a weight of beside these: codes, as integers."""
        return torch.empty(0, dtype=torch.int32)

    def base_of(self, learnt: Mapping[str, Tensor], codes: Tensor) -> Tensor:
        """`decode_codes` with these numbers in the place of `base_learnt`; differentiable in them."""
        raise AssertionError(f"{type(self).__name__} has nothing to train but its low-rank part")

    def base_tensors(self, learnt: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Buffers by name, for `refill`: these numbers, rounded to what is stored."""
        raise AssertionError(f"{type(self).__name__} has nothing to train but its low-rank part")

    def _whole(self, codes_OI: Tensor, factors: tuple[Tensor, Tensor] | None, row_scale_O: Tensor | None) -> Tensor:
        """The weight [O, I] that these parts give; differentiable in all of them."""
        base_OI = self.turned_back(codes_OI)
        weight_OI = base_OI if factors is None else base_OI + factors[0] @ factors[1]
        return weight_OI if row_scale_O is None else weight_OI * row_scale_O.float()[:, None]

    @property
    def is_plain(self) -> bool:
        """Whether the weight is what the codes decode to, with nothing added to it."""
        return self.lowrank is None and self.row_scale is None and self.turning is None

    @property
    def beside_bits(self) -> int:
        """Bits that every product reads and no checkpoint of the layer holds."""
        return 0

    @property
    def multiplied(self) -> PackedLinear:
        """The layer whose product decides the kind: itself, or the part of it that is decoded."""
        return self

    @property
    def contracts(self) -> bool:
        """Whether `contracted` is less work than a product with the weight."""
        return False

    def contracted(self, x: Tensor) -> Tensor:
        """x [..., I] times the weight, of a layer that never forms it; without bias."""
        raise AssertionError(f"{type(self).__name__} has no product but that with its weight")

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] times the weight, plus bias: [..., O] in the dtype of x."""
        return linear(self, x)

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in self._hyper.items())


FORMATS: Registry[type[PackedLinear]] = Registry(
    "format",
    PackedLinear,
    {
        "dense": "kernels.formats.dense:DenseLinear",
        "uniform": "kernels.formats.uniform:UniformLinear",
        "codebook": "kernels.formats.codebook:CodebookLinear",
        "trellis": "kernels.formats.trellis:TrellisLinear",
        "conv": "kernels.formats.conv:ConvLinear",
        "factors": "kernels.formats.factors:FactorsLinear",
        "mpo": "kernels.formats.mpo:MpoLinear",
        "bands": "kernels.formats.bands:BandsLinear",
        "signs": "kernels.formats.signs:SignsLinear",
        "delta": "kernels.formats.delta:DeltaLinear",
        "ggml": "kernels.formats.ggml:GgmlLinear",
        "hqq": "kernels.formats.hqq:HqqLinear",
    },
    group="ptq_harness.formats",
)
