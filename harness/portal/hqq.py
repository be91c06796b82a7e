"""`hqq`: what the package of Half-Quadratic Quantization saves in safetensors, itself or through transformers.

W_q      uint8 (int32 of 3 bits), packed    kernels.formats.hqq says how
scale    fp16, bf16 or fp32, one a group
zero     likewise, of any value

Beside them every layer has its own settings as tensors of a few numbers (texts by their characters), which are what is
read; where the configuration says otherwise, the file is mislabelled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from harness.portal.foreign import Brought, Checkpoint, Importer, bits_of
from kernels.formats.hqq import NUMBERS, WIDTHS, HqqLinear
from kernels.formats.layer import LayerSpec

NEEDED = ("nbits", "group_size", "shape", "axis", "packing")
# What else there may be of a layer, and decides nothing here.
BESIDE = (
    "unpack_view_dtype",
    "compute_dtype",
    "channel_wise",
    "optimize",
    "round_zero",
    "offload_meta",
    "encoded_state_dict",
    "stores_quant_config",
    "view_as_float",
    "quant_scale",
    "quant_zero",
)
PACKINGS = {"8bit_u8": 8, "4bit_u8": 4, "3bit_32": 3, "2bit_u8": 2, "1bit_u8": 1}  # -> bits of a code
REFUSED = {  # setting -> (the value that is not read, what it means)
    "quant_scale": (1, "has scales that are quantised themselves"),
    "quant_zero": (1, "has zero points that are quantised themselves"),
    "channel_wise": (0, "has one scale for all of it"),
}
assert set(PACKINGS.values()) == set(WIDTHS)


class FromHqq(Importer):
    def check(self, quantization: Mapping[str, Any]) -> None:
        config = quantization.get("quant_config")
        if not isinstance(config, Mapping):
            raise ValueError(f"its quantization_config has quant_config={config!r}, which is no hqq of a version known")
        said = config.get("weight_quant_params") or {}  # else it has one for every role of layers
        self.said = {n: said[n] for n in ("nbits", "group_size", "axis") if said.get(n) is not None}

    def layer(self, checkpoint: Checkpoint, spec: LayerSpec) -> Brought | None:
        name, rows, columns = spec.name, spec.out_features, spec.in_features
        if f"{name}.W_q" not in checkpoint:
            return None
        where = f"{checkpoint.path}: {name}"
        settings = {leaf: checkpoint.take(f"{name}.{leaf}") for leaf in NEEDED}
        settings |= {leaf: checkpoint.take(f"{name}.{leaf}") for leaf in BESIDE if f"{name}.{leaf}" in checkpoint}
        for leaf, (value, meaning) in REFUSED.items():
            if leaf in settings and settings[leaf].item() == value:
                raise ValueError(f"{where} {meaning} ({leaf}), which is not read here")
        width, group, axis = _width(settings["packing"], where), int(settings["group_size"]), int(settings["axis"])
        self._require_said(settings, where)
        if settings["shape"].tolist() != [rows, columns] or group < 1 or rows * columns % group or axis not in (0, 1):
            raise ValueError(
                f"{where} is {settings['shape'].tolist()} in groups of {group} along axis {axis}, where "
                f"{[rows, columns]} belongs: the file is mislabelled, or of another model"
            )
        groups = rows * columns // group
        packed, scale = checkpoint.take(f"{name}.W_q"), checkpoint.take(f"{name}.scale")
        numbers = next((known for known, dtype in NUMBERS.items() if dtype == scale.dtype), "")
        if not numbers:
            raise ValueError(f"{where}.scale is {scale.dtype}, which is none of {', '.join(NUMBERS)}")
        layer = HqqLinear(columns, rows, spec.bias, width=width, group=group, axis=axis, numbers=numbers)
        codes = packed.view(layer.codes.dtype) if packed.is_floating_point() else packed  # its view_as_float
        found = {"codes": codes, "scales": scale, "zeros": checkpoint.take(f"{name}.zero")}
        for leaf, tensor in found.items():
            declared = layer.get_buffer(leaf)
            if tensor.shape != declared.shape or tensor.dtype != declared.dtype:
                raise ValueError(
                    f"{where} has {leaf} of {list(tensor.shape)} {tensor.dtype} where {list(declared.shape)} "
                    f"{declared.dtype} belongs ({groups} groups of {group}): the file is mislabelled"
                )
        layer.fill(**found)
        tensors = {"W_q": packed, "scale": scale, "zero": found["zeros"], **settings}
        parts = dict.fromkeys(settings, "tables") | {"W_q": "codes", "scale": "scales", "zero": "scales"}
        return Brought(layer, bits_of(tensors, **parts))

    def _require_said(self, settings: Mapping[str, Tensor], where: str) -> None:
        """Raises ValueError where the configuration says otherwise."""
        for name, value in self.said.items():
            found = settings[name].item()
            if abs(found - value) > 1e-3:  # 1.58 bits, in fp32 there
                raise ValueError(f"{where}.{name} is {found:g}, and {value} in its config: the file is mislabelled")


def _width(characters: Tensor, where: str) -> int:
    text = bytes(characters.to(torch.uint8).flatten().tolist()).decode("ascii", "replace")
    if text not in PACKINGS:
        raise ValueError(f"{where} is packed as '{text}', which is not read here; {', '.join(PACKINGS)} are")
    return PACKINGS[text]


IMPORTER = FromHqq()
