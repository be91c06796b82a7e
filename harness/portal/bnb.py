"""`bnb`: NF4 of bitsandbytes, the base of QLoRA (Dettmers et al., arXiv 2305.14314, sec. 3).

    weight                 uint8 [N / 2, 1]    codes of the flattened matrix, two to a byte, the first in the high half
    weight.absmax          uint8 [N / 64]      codes of the blocks' scales; fp32 where they are not quantised themselves
    weight.quant_map       fp32 [16]           the levels
    weight.nested_absmax   fp32 [N / 64 / 256], weight.nested_quant_map fp32 [256], and an offset
    weight.quant_state.bitsandbytes__nf4       what else there is, as JSON

Blocks run on across rows. Where 64 divides a row that is the layout of `nf:bits=4,block=64`, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from harness.portal.folder import CellReader, Exporter, Request, Tensors, write_adapter, write_folder
from harness.portal.foreign import Brought, Checkpoint, Importer, bits_of
from kernels.formats.codebook import CodebookLinear
from kernels.formats.layer import LayerSpec
from kernels.formats.normal_float import dynamic_map, nf_levels
from kernels.formats.packed import PackedLinear

BLOCK, NESTED = 64, 256
STATE = "weight.quant_state.bitsandbytes__"
NESTED_PARTS = ("nested_absmax", "nested_quant_map")
LOAD = """from transformers import AutoModelForCausalLM  # with bitsandbytes installed

model = AutoModelForCausalLM.from_pretrained("this folder")"""


class Bnb(Exporter):
    options = ("whole", "base")

    def write(self, request: Request) -> None:
        reader = CellReader(request.cell)
        names = list(reader.description.layers)
        base = request.option == "base"
        for name in names:
            _require_nf4(reader.layer(name), name, base)
        dtype = request.cell.artifact.spec.dtype
        quantization = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": ["lm_head"],
        }

        def tensors() -> Tensors:
            for name in names:
                found = packed(reader.layer(name), dtype)
                yield from ((f"{name}.{leaf}", tensor) for leaf, tensor in found.items())
            yield from reader.uncovered()
            yield from reader.rest()

        write_folder(request, "bnb", tensors, quantization, LOAD, dtype)
        if base:
            write_adapter(request)


def _require_nf4(layer: PackedLinear, name: str, base: bool) -> None:
    """Raises ValueError for a layer that is not what bitsandbytes stores."""
    fits = isinstance(layer, CodebookLinear) and (
        (layer.dim, layer.index_bits, layer.block, layer._hyper["table"], layer.scales.form.scheme, layer.order)
        == (1, 4, BLOCK, "nf", "dynamic", None)
    )
    if not fits or layer.in_features % BLOCK:
        raise ValueError(
            f"{name} is not NF4 in blocks of {BLOCK} that fill its rows, all that bitsandbytes stores: "
            "`run --methods nf:bits=4,block=64 --allocate uniform` makes such a cell, or write --format hf"
        )
    if layer.rounds:
        raise ValueError(f"{name} rounds its inputs, which bitsandbytes does not: write --format hf")
    if layer.rotation is not None or layer.reassembly is not None or not base and not layer.is_plain:
        raise ValueError(f"{name} has a low-rank part: --variant base writes it beside the base, for peft")


def packed(layer: PackedLinear, dtype: str) -> dict[str, Tensor]:
    """The tensors of a layer by name."""
    assert isinstance(layer, CodebookLinear)
    scales = layer.scales
    assert scales.codes is not None and scales.steps is not None and scales.offset is not None
    code_N2 = layer.indices().reshape(-1, 2)
    rest = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": dtype,
        "shape": [layer.out_features, layer.in_features],
        "nested_blocksize": NESTED,
        "nested_dtype": "float32",
        "nested_offset": scales.offset.item(),
    }
    return {
        "weight": (code_N2[:, :1] * 16 + code_N2[:, 1:]).to(torch.uint8),
        "weight.absmax": scales.codes.flatten(),
        "weight.quant_map": nf_levels(4),
        "weight.nested_absmax": scales.steps,
        "weight.nested_quant_map": dynamic_map().clone(),
        f"{STATE}nf4": torch.tensor(list(json.dumps(rest).encode()), dtype=torch.uint8),
    }


class FromBnb(Importer):
    def check(self, quantization: Mapping[str, Any]) -> None:
        kind = quantization.get("bnb_4bit_quant_type")
        if not quantization.get("load_in_4bit") or kind != "nf4":
            raise ValueError(
                f"the checkpoint is of bitsandbytes in {'4' if quantization.get('load_in_4bit') else '8'} bits, type "
                f"{kind}: only nf4 has numbers that a layout here keeps: load and save it with bnb_4bit_quant_type=nf4"
            )

    def layer(self, checkpoint: Checkpoint, spec: LayerSpec) -> Brought | None:
        if f"{spec.name}.{STATE}nf4" not in checkpoint:
            return None
        where, rows, columns = f"{checkpoint.path}: {spec.name}", spec.out_features, spec.in_features
        state = checkpoint.take(f"{spec.name}.{STATE}nf4")
        known = json.loads(bytes(state.tolist()))
        block = known["blocksize"]
        if known["shape"] != [rows, columns] or columns % block:
            raise ValueError(f"{where} is {known['shape']} in blocks of {block}: none that fill rows of {columns}")
        count, blocks = rows * columns, rows * columns // block
        tensors = {
            "weight": checkpoint.shaped(f"{spec.name}.weight", count // 2, 1),
            "absmax": checkpoint.shaped(f"{spec.name}.weight.absmax", blocks),
            "quant_map": checkpoint.shaped(f"{spec.name}.weight.quant_map", 16),
            "state": state,
        }
        _require_equal(tensors["quant_map"], nf_levels(4), f"{where}.weight.quant_map")
        form: dict[str, Any] = dict(scales="double", scale_bits=8, scale_group=1)
        # A scale in fp32 is one step of its own, taken once.
        scales = {"codes": torch.ones(rows, columns // block, dtype=torch.uint8), "steps": tensors["absmax"]}
        scales["offset"] = torch.zeros(1)
        if f"{spec.name}.weight.nested_absmax" in checkpoint:
            form = dict(scales="dynamic")
            nested = {leaf: checkpoint.take(f"{spec.name}.weight.{leaf}") for leaf in NESTED_PARTS}
            _require_equal(nested["nested_quant_map"], dynamic_map(), f"{where}.weight.nested_quant_map")
            if known["nested_blocksize"] != NESTED:
                raise ValueError(f"{where} has scales in groups of {known['nested_blocksize']}: only {NESTED} is read")
            scales = {"codes": tensors["absmax"].view(rows, -1), "steps": nested["nested_absmax"]}
            scales["offset"] = torch.tensor([known["nested_offset"]])
            tensors |= nested
        layer = CodebookLinear(columns, rows, spec.bias, dim=1, index_bits=4, block=block, table="nf", **form)
        code_OI = torch.stack([tensors["weight"] >> 4, tensors["weight"] & 15], dim=2).view(rows, columns)
        layer.fill(**layer.tensors(code_OI, scales))
        parts = dict.fromkeys(tensors, "scales") | {
            "weight": "codes",
            "quant_map": "tables",
            "nested_quant_map": "tables",
        }
        return Brought(layer, bits_of(tensors, **parts))


def _require_equal(found: Tensor, expected: Tensor, name: str) -> None:
    if not torch.equal(found.float(), expected):
        raise ValueError(f"{name} is not the published table: another format under this name")


EXPORTER, IMPORTER = Bnb(), FromBnb()
