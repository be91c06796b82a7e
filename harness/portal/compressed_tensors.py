"""`compressed-tensors`: the format of llm-compressor and vLLM, its `pack-quantized` form of uniform grids.

    weight_packed      int32 [O, I * b / 32]   our own words: codes along a row, from a word's lowest bit
    weight_scale       fp16  [O, G]
    weight_zero_point  int32 [O * b / 32, G]   packed down O; none where grids are symmetric
    weight_shape       int64 [2]

Codes and zero points are offset binaries there (q - 2**(b - 1) as signed integers), whose bits are ours. Every layer
may have a scheme of its own, so mixed cells leave whole; an order of columns and what is added to a grid do not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from harness.portal.folder import CellReader, Exporter, Request, Tensors, write_folder
from harness.portal.foreign import Brought, Checkpoint, Importer, bits_of, requires
from harness.portal.uniform import WHOLE_ROW, Numbers, exact_half, groups_of, of_layer
from kernels.formats.bitpack import pack, packed_words, unpack
from kernels.formats.layer import LayerSpec

LOAD = """from transformers import AutoModelForCausalLM  # with compressed-tensors installed

model = AutoModelForCausalLM.from_pretrained("this folder")"""


class CompressedTensors(Exporter):
    def write(self, request: Request) -> None:
        reader = CellReader(request.cell)
        groups: dict[tuple[int, int | None, bool], list[str]] = {}
        ignored = ["lm_head"]
        for name, spec in reader.description.layers.items():
            if spec["format"] == "dense":
                ignored.append(name)
                continue
            numbers = _checked(of_layer(reader.layer(name), name, "compressed-tensors"), name)
            whole = numbers.group >= numbers.codes_OI.shape[1]
            scheme = (numbers.bits, None if whole else numbers.group, numbers.zero_OG is None)
            groups.setdefault(scheme, []).append(name)
        if not groups:
            raise ValueError(f"{request.cell.label} is not quantised: its own folder is a model already")
        quantization = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {f"group_{i}": _scheme(*key, names) for i, (key, names) in enumerate(groups.items())},
            "ignore": ignored,
            "kv_cache_scheme": None,
        }

        def tensors() -> Tensors:
            for name, spec in reader.description.layers.items():
                if spec["format"] != "dense":
                    found = of_layer(reader.layer(name), name, "compressed-tensors")
                    yield from ((f"{name}.{leaf}", tensor) for leaf, tensor in packed(found).items())
            for name, tensor in reader.packed():
                if name.rpartition(".")[0] in ignored:
                    yield name, tensor
            yield from reader.uncovered()
            yield from reader.rest()

        write_folder(request, "compressed-tensors", tensors, quantization, LOAD, reader.description.half)


def _scheme(bits: int, group: int | None, symmetric: bool, targets: list[str]) -> dict[str, Any]:
    strategy = "channel" if group is None else "group"
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "group_size": group}
    return {"targets": targets, "weights": weights | {"dynamic": False}}


def _checked(numbers: Numbers, name: str) -> Numbers:
    """Raises ValueError for numbers that the format has no place for."""
    if numbers.minimum_OG is not None:
        raise ValueError(f"{name} stores minima in the place of zero points: write --format hf")
    if numbers.order_I is not None:
        raise ValueError(f"{name} forms its groups along an order of columns: write --format gptq, or hf")
    if numbers.codes_OI.shape[1] % numbers.group:
        raise ValueError(f"{name} ends in a smaller group: write --format hf")
    return numbers


def packed(numbers: Numbers) -> dict[str, torch.Tensor]:
    """The tensors of a layer by name."""
    found = {
        "weight_packed": pack(numbers.codes_OI, numbers.bits),
        "weight_scale": numbers.scale_OG,
        "weight_shape": torch.tensor(numbers.codes_OI.shape),
    }
    if numbers.zero_OG is not None:
        found["weight_zero_point"] = pack(numbers.zero_OG.t().contiguous(), numbers.bits).t().contiguous()
    return found


class FromCompressedTensors(Importer):
    """`pack-quantized`; a layer's scheme is the one of the group that names it, its class or a pattern of it."""

    def check(self, quantization: Mapping[str, Any]) -> None:
        groups = requires(quantization, "config_groups", dict, "compressed-tensors")
        forms = {quantization.get("format"), *(group.get("format") for group in groups.values())} - {None}
        if forms != {"pack-quantized"}:
            raise ValueError(
                f"the checkpoint is of compressed-tensors' {', '.join(map(str, forms))}: only pack-quantized is read"
            )
        self.schemes = [(group.get("targets", []), group.get("weights") or {}) for group in groups.values()]
        for _, weights in self.schemes:
            kind, bits, strategy = (weights.get(name) for name in ("type", "num_bits", "strategy"))
            if kind != "int" or not isinstance(bits, int) or not 1 <= bits <= 8 or strategy not in ("group", "channel"):
                raise ValueError(
                    f"it has {kind} weights of {bits} bits by {strategy}: only int by group or channel is read"
                )
            if strategy == "group":
                requires(weights, "group_size", int, "compressed-tensors")

    def layer(self, checkpoint: Checkpoint, spec: LayerSpec) -> Brought | None:
        name, rows, columns = spec.name, spec.out_features, spec.in_features
        if f"{name}.weight_packed" not in checkpoint:
            return None
        weights = next((weights for targets, weights in self.schemes if _named(name, targets)), None)
        if weights is None:
            raise ValueError(f"{checkpoint.path}: no group of its quantization_config targets {name}")
        if f"{name}.weight_g_idx" in checkpoint:
            raise ValueError(
                f"{checkpoint.path}: {name} has an order of columns (weight_g_idx), which is not read here"
            )
        bits = weights["num_bits"]
        by_row = weights["strategy"] == "channel"
        group, groups = groups_of(columns, WHOLE_ROW if by_row else weights["group_size"])
        tensors = {
            "weight_packed": checkpoint.shaped(f"{name}.weight_packed", rows, packed_words(columns, bits)),
            "weight_scale": checkpoint.shaped(f"{name}.weight_scale", rows, groups),
            "weight_shape": checkpoint.shaped(f"{name}.weight_shape", 2),
        }
        if tensors["weight_shape"].tolist() != [rows, columns]:
            raise ValueError(
                f"{checkpoint.path}: {name}.weight_shape is {tensors['weight_shape'].tolist()}: mislabelled"
            )
        zero_OG = None
        if not weights.get("symmetric", True):
            tensors["weight_zero_point"] = checkpoint.shaped(
                f"{name}.weight_zero_point", packed_words(rows, bits), groups
            )
            zero_OG = unpack(tensors["weight_zero_point"].t().contiguous(), bits, rows).t().contiguous()
        codes_OI = unpack(tensors["weight_packed"], bits, columns)
        scale_OG = exact_half(tensors["weight_scale"], f"{checkpoint.path}: {name}.weight_scale")
        parts = {
            "weight_packed": "codes",
            "weight_scale": "scales",
            "weight_shape": "tables",
            "weight_zero_point": "scales",
        }
        return Brought(Numbers(bits, group, codes_OI, scale_OG, zero_OG).layer(spec.bias), bits_of(tensors, **parts))


def _named(name: str, targets: list[str]) -> bool:
    return any(
        re.match(target[3:], name) if target.startswith("re:") else target in (name, "Linear") for target in targets
    )


EXPORTER, IMPORTER = CompressedTensors(), FromCompressedTensors()
