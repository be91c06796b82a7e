"""`gptq`: the community's format of uniform grids, begun by AutoGPTQ, read by GPTQModel, vLLM, ExLlama and others.

    qweight  int32 [I * b / 32, O]    the codes of every column of O, a stream of bits down I
    qzeros   int32 [G, O * b / 32]    zero points along O; version 1 stores them less one, version 2 as they are
    scales   fp16  [G, O]
    g_idx    int32 [I]                the group of every input column

Streams begin at a word's lowest bit, and codes of 3 bits cross words: `kernels.formats.bitpack`'s own order, turned.
Version 1 is what every loader reads; a zero point of 0 has no place in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from harness import __version__
from harness.portal.folder import CellReader, Exporter, Request, Tensors, write_folder
from harness.portal.foreign import Brought, Checkpoint, Importer, bits_of, requires
from harness.portal.uniform import WHOLE_ROW, Numbers, exact_half, groups_of, of_layer
from kernels.formats.bitpack import WORD_BITS, pack, packed_words, unpack
from kernels.formats.layer import LayerSpec

BITS = (2, 3, 4, 8)  # what loaders have kernels for
FIRST = "gptq"
VERSIONS = {"v1": FIRST, "v2": "gptq_v2"}  # -> checkpoint_format
PACKERS = ("auto_round:auto_gptq", "auto_round:gptqmodel")  # of auto-round, which writes the first
LOAD = """from gptqmodel import GPTQModel

model = GPTQModel.load("this folder")  # or from_pretrained() of transformers, with gptqmodel and optimum"""


class Gptq(Exporter):
    options = tuple(VERSIONS)

    def write(self, request: Request) -> None:
        reader = CellReader(request.cell)
        kinds = {str(sorted(_shared(spec).items())) for spec in reader.description.layers.values()}
        if len(kinds) > 1:
            raise ValueError(
                f"{request.cell.label} stores its matrices in {len(kinds)} ways and gptq has one for all: "
                "`run --allocate uniform` makes such a cell, or write --format compressed-tensors"
            )
        first = next(iter(reader.description.layers))
        known = {name: _checked(of_layer(reader.layer(name), name, "gptq"), name) for name in reader.description.layers}
        if request.option == "v1" and (zero := next((name for name, found in known.items() if found), "")):
            raise ValueError(f"{zero} has zero points of 0, which version 1 cannot store: write --variant v2")
        numbers = of_layer(reader.layer(first), first, "gptq")
        columns = numbers.codes_OI.shape[1]
        quantization: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": numbers.bits,
            "group_size": WHOLE_ROW if numbers.group >= columns else numbers.group,
            "desc_act": numbers.order_I is not None,
            "sym": numbers.zero_OG is None,
            "lm_head": False,
            "checkpoint_format": VERSIONS[request.option],
            "pack_dtype": "int32",
            "meta": {"quantizer": [f"ptq-harness:{__version__}"]},
        }

        def tensors() -> Tensors:
            for name in reader.description.layers:
                found = of_layer(reader.layer(name), name, "gptq")
                yield from ((f"{name}.{leaf}", tensor) for leaf, tensor in packed(found, request.option).items())
            yield from reader.uncovered()
            yield from reader.rest()

        write_folder(request, "gptq", tensors, quantization, LOAD, reader.description.half)


def _shared(spec: Any) -> dict[str, Any]:
    return {key: value for key, value in spec.items() if key not in ("in_features", "out_features", "bias")}


def _checked(numbers: Numbers, name: str) -> bool:
    """Whether any zero point is 0. Raises ValueError for numbers that no loader of the format takes."""
    rows, columns = numbers.codes_OI.shape
    if numbers.bits not in BITS:
        raise ValueError(f"{name} has {numbers.bits} bits, and gptq {', '.join(map(str, BITS))}: write --format hf")
    if numbers.minimum_OG is not None:
        raise ValueError(f"{name} stores minima in the place of zero points: write --format hf")
    if columns % numbers.group or columns % WORD_BITS or rows % WORD_BITS:
        raise ValueError(
            f"{name} is {rows} x {columns} in groups of {numbers.group}: gptq wants sides that are multiples of 32, "
            "and columns of the group too: write --format hf"
        )
    return numbers.zero_OG is not None and not bool(numbers.zero_OG.all())


def packed(numbers: Numbers, version: str) -> dict[str, torch.Tensor]:
    """The tensors of a layer by name."""
    zero_OG = numbers.zero_OG
    if zero_OG is None:
        zero_OG = torch.full(numbers.scale_OG.shape, 2 ** (numbers.bits - 1), dtype=torch.int32)
    return {
        "qweight": pack(numbers.codes_OI, numbers.bits).t().contiguous(),
        "qzeros": pack((zero_OG - int(version == "v1")).t().contiguous(), numbers.bits),
        "scales": numbers.scale_OG.t().contiguous(),
        "g_idx": numbers.group_I.to(torch.int32),
    }


class FromGptq(Importer):
    """Of GPTQModel, AutoGPTQ and auto-round. What the configuration says of bits, groups and order is held against the
    tensors, which are what is read."""

    def check(self, quantization: Mapping[str, Any]) -> None:
        self.bits = requires(quantization, "bits", int, "gptq")
        self.group = requires(quantization, "group_size", int, "gptq")
        form = quantization.get("checkpoint_format") or quantization.get("format") or FIRST
        form = FIRST if form in PACKERS else form
        if form not in VERSIONS.values():
            raise ValueError(f"the checkpoint is of gptq's form '{form}': save it as {' or '.join(VERSIONS.values())}")
        if self.bits not in BITS:
            raise ValueError(f"its quantization_config says {self.bits} bits, and gptq has {', '.join(map(str, BITS))}")
        if quantization.get("dynamic"):
            raise ValueError("its quantization_config has 'dynamic' (bits of single layers), which is not read here")
        self.less = int(form == FIRST)

    def layer(self, checkpoint: Checkpoint, spec: LayerSpec) -> Brought | None:
        name, rows, columns = spec.name, spec.out_features, spec.in_features
        if f"{name}.qweight" not in checkpoint:
            return None
        group, groups = groups_of(columns, self.group)
        tensors = {
            "qweight": checkpoint.shaped(f"{name}.qweight", packed_words(columns, self.bits), rows),
            "qzeros": checkpoint.shaped(f"{name}.qzeros", groups, packed_words(rows, self.bits)),
            "scales": checkpoint.shaped(f"{name}.scales", groups, rows),
        }
        group_I = torch.arange(columns) // group
        order_I = None
        if f"{name}.g_idx" in checkpoint:
            tensors["g_idx"] = checkpoint.shaped(f"{name}.g_idx", columns)
            if not torch.equal(tensors["g_idx"].long(), group_I):
                order_I = torch.sort(tensors["g_idx"].long(), stable=True).indices
                if not torch.equal(tensors["g_idx"].long()[order_I], group_I):
                    raise ValueError(f"{checkpoint.path}: {name}.g_idx is no division into groups of {group}")
        zero_GO = unpack(tensors["qzeros"], self.bits, rows) + self.less
        zero_GO &= 2**self.bits - 1  # version 1 wraps round where a zero point was 0
        codes_OI = unpack(tensors["qweight"].t().contiguous(), self.bits, columns)
        symmetric = bool((zero_GO == 2 ** (self.bits - 1)).all())
        zero_OG = None if symmetric else zero_GO.t().contiguous()
        scale_OG = exact_half(tensors["scales"], f"{checkpoint.path}: {name}.scales").t().contiguous()
        numbers = Numbers(self.bits, group, codes_OI, scale_OG, zero_OG, order_I=order_I)
        parts = {"qweight": "codes", "qzeros": "scales", "scales": "scales", "g_idx": "tables"}
        return Brought(numbers.layer(spec.bias), bits_of(tensors, **parts))


EXPORTER, IMPORTER = Gptq(), FromGptq()
