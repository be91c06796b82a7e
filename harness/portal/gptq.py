"""`gptq`: the community's format of uniform grids, begun by AutoGPTQ, read by GPTQModel, vLLM, ExLlama and others.

    qweight  int32 [I * b / 32, O]    the codes of every column of O, a stream of bits down I
    qzeros   int32 [G, O * b / 32]    zero points along O; version 1 stores them less one, version 2 as they are
    scales   fp16  [G, O]
    g_idx    int32 [I]                the group of every input column

Streams begin at a word's lowest bit, and codes of 3 bits cross words: `kernels.formats.bitpack`'s own order, turned.
Version 1 is what every loader reads; a zero point of 0 has no place in it."""

from __future__ import annotations

from typing import Any

import torch

from harness import __version__
from harness.portal.folder import CellReader, Exporter, Request, Tensors, write_folder
from harness.portal.uniform import Numbers, of_layer
from kernels.formats.bitpack import WORD_BITS, pack

BITS = (2, 3, 4, 8)  # what loaders have kernels for
VERSIONS = {"v1": "gptq", "v2": "gptq_v2"}  # -> checkpoint_format
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
            "group_size": -1 if numbers.group >= columns else numbers.group,
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


EXPORTER = Gptq()
