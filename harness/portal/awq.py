"""`awq`: the 4-bit format of AutoAWQ (its `gemm` version), whose scales of the inputs are folded into the layer before.

qweight  int32 [I, O / 8]    eight codes of a word, in the order ORDER
qzeros   int32 [G, O / 8]    likewise
scales   fp16  [G, O]"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from harness.portal.foreign import Brought, Checkpoint, Importer, bits_of, requires
from harness.portal.uniform import Numbers, exact_half, groups_of
from kernels.formats.layer import LayerSpec

BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # output whose code stands at every place of a word, from the lowest bits on


class FromAwq(Importer):
    def check(self, quantization: Mapping[str, Any]) -> None:
        bits = quantization.get("bits", quantization.get("w_bit"))
        version = str(quantization.get("version", "gemm")).lower()
        if bits != BITS or version != "gemm":
            raise ValueError(f"the checkpoint is awq of {bits} bits, version '{version}': only 4 bits of gemm are read")
        name = "group_size" if "group_size" in quantization else "q_group_size"
        self.group = requires(quantization, name, int, "awq")

    def layer(self, checkpoint: Checkpoint, spec: LayerSpec) -> Brought | None:
        name, rows, columns = spec.name, spec.out_features, spec.in_features
        if f"{name}.qweight" not in checkpoint:
            return None
        group, groups = groups_of(columns, self.group)
        tensors = {
            "qweight": checkpoint.shaped(f"{name}.qweight", columns, rows // 8),
            "qzeros": checkpoint.shaped(f"{name}.qzeros", groups, rows // 8),
            "scales": checkpoint.shaped(f"{name}.scales", groups, rows),
        }
        codes_OI, zero_OG = (_unpacked(tensors[leaf]).t().contiguous() for leaf in ("qweight", "qzeros"))
        scale_OG = exact_half(tensors["scales"], f"{checkpoint.path}: {name}.scales").t().contiguous()
        parts = {"qweight": "codes", "qzeros": "scales", "scales": "scales"}
        return Brought(Numbers(BITS, group, codes_OI, scale_OG, zero_OG).layer(spec.bias), bits_of(tensors, **parts))


def _unpacked(words: Tensor) -> Tensor:
    """Codes int32 [N, O] of words [N, O / 8]."""
    places = (words[:, :, None] >> (BITS * torch.arange(8, dtype=torch.int32))) & (2**BITS - 1)
    return places[:, :, torch.tensor(ORDER).argsort()].flatten(1)


IMPORTER = FromAwq()
