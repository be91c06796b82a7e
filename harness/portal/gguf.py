"""`gguf`: the file of llama.cpp. A cell of uniform grids leaves in it, and any file of it comes in.

Types of one scale (and minimum) to 32 weights are plain grids and become them, without a change of a number; all others
that the `gguf` package decodes are kept as the blocks they are (kernels.formats.ggml).

    Q4_0  fp16 d; 32 codes of 4 bits, w = d * (q - 8)      Q5_0  likewise of 5 bits, d * (q - 16)
    Q4_1  fp16 d, m; w = d * q + m                         Q5_1  likewise of 5 bits
    Q8_0  fp16 d; 32 signed bytes, w = d * q

Code j of the lower half of a block shares a byte with code j + 16; fifth bits stand apart, 32 in a word. Llama's and
Mistral's rows of queries and keys are in an order of their own there (two interleaved halves of every head)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from harness.portal.foreign import Brought, Checkpoint, Importer
from harness.portal.uniform import Numbers
from kernels.formats.bits import StoredBits
from kernels.formats.ggml import GgmlLinear, row_bytes
from kernels.formats.layer import LayerSpec
from kernels.formats.packed import PackedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GROUP = 32
PLAIN = ("F32", "F16", "BF16")
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PERMUTED = ("llama",)  # architectures whose queries and keys are reordered; Mistral's models are among them
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # of a model_type


class GgufFile(Checkpoint):
    """A file's tensors under the names of transformers."""

    def __init__(self, path: Path, model: PreTrainedModel) -> None:
        from gguf import MODEL_ARCH, GGUFReader, get_tensor_name_map

        self.path, self.quantization = path, {}
        try:
            reader = GGUFReader(path)
        except (ValueError, OSError, IndexError, KeyError) as error:
            raise ValueError(f"{path} is no GGUF file that can be read ({error}): copy it again") from None
        config = model.config
        self._require_same(reader, config)
        self.architecture = ARCHITECTURES[config.model_type]
        blocks = config.num_hidden_layers
        names = get_tensor_name_map(MODEL_ARCH[self.architecture.upper()], blocks)
        theirs = {}
        for name, _ in model.named_parameters(remove_duplicate=False):
            owner, _, leaf = name.rpartition(".")
            found = names.get_name(owner)
            if found is None:
                raise ValueError(f"gguf knows no name for {name} of {config.model_type}: not read here")
            theirs[f"{found}.{leaf}"] = name
        self._tensors = {theirs.get(t.name, t.name): t for t in reader.tensors}
        self._left = {name for name in self._tensors if name != "rope_freqs.weight"}
        self._heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        self.kinds: dict[str, int] = {}  # type -> weights of blocks
        self.said = _field(reader, "general.file_type")

    def __exit__(self, *raised: object) -> None:
        self._tensors.clear()  # the file is mapped as long as somebody has one

    def _require_same(self, reader: Any, config: Any) -> None:
        said = _field(reader, "general.architecture")
        wanted = ARCHITECTURES.get(config.model_type)
        if wanted is None:
            raise ValueError(
                f"models of type {config.model_type} are not read from GGUF; {', '.join(ARCHITECTURES)} are"
            )
        if said != wanted:
            raise ValueError(f"{self.path} is of architecture '{said}', --model of '{wanted}': give the model it is of")
        sizes = {
            "block_count": config.num_hidden_layers,
            "embedding_length": config.hidden_size,
            "attention.head_count": config.num_attention_heads,
            "attention.head_count_kv": config.num_key_value_heads,
        }
        for name, ours in sizes.items():
            found = _field(reader, f"{said}.{name}")
            if found is not None and found != ours:
                raise ValueError(f"{self.path} has {name} {found}, --model {ours}: give the model it is of")

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def raw(self, name: str, rows: int, columns: int) -> tuple[str, np.ndarray]:
        """(type, the bytes of every row [O, B], rows in the order of transformers)."""
        tensor = self._tensor(name)
        if tuple(int(n) for n in reversed(tensor.shape)) != (rows, columns):
            found = [int(n) for n in reversed(tensor.shape)]
            raise ValueError(f"{self.path}: {name} is {found} where {[rows, columns]} belongs: it is of another model")
        data = np.ascontiguousarray(tensor.data).view(np.uint8).reshape(rows, -1)
        heads = self._heads.get(name.split(".")[-2]) if self.architecture in PERMUTED else None
        if heads:  # [heads, half of a head, two] -> [heads, two, half]
            data = data.reshape(heads, rows // heads // 2, 2, -1).swapaxes(1, 2).reshape(rows, -1)
        return tensor.tensor_type.name, data

    def take(self, name: str) -> Tensor:
        from gguf.quants import dequantize

        tensor = self._tensor(name)
        if tensor.tensor_type.name in PLAIN or len(tensor.shape) > 1:
            shape = [int(n) for n in reversed(tensor.shape)]
            rows = shape[0] if len(shape) > 1 else 1
            _, data = self.raw(name, rows, shape[-1]) if len(shape) > 1 else ("", tensor.data.view(np.uint8))
            values = dequantize(data.reshape(rows, -1), tensor.tensor_type)
            return torch.from_numpy(np.array(values, dtype=np.float32)).reshape(shape)
        raise ValueError(f"{self.path}: {name} is a vector of type {tensor.tensor_type.name}, which is not read here")

    def _tensor(self, name: str) -> Any:
        if name not in self._tensors:
            raise ValueError(f"{self.path} lacks {name}: the file is incomplete, or of another model")
        self._left.discard(name)
        return self._tensors[name]


def _field(reader: Any, name: str) -> Any:
    field = reader.fields.get(name)
    return field.contents() if field is not None else None


class FromGguf(Importer):
    def open(self, path: Path, model: PreTrainedModel) -> GgufFile:
        return GgufFile(path, model)

    def layer(self, checkpoint: Checkpoint, spec: LayerSpec) -> Brought | None:
        assert isinstance(checkpoint, GgufFile)
        kind, data = checkpoint.raw(f"{spec.name}.weight", spec.out_features, spec.in_features)
        checkpoint.kinds[kind] = checkpoint.kinds.get(kind, 0) + spec.weights
        if kind in FLOATS:
            return None
        bits = 8 * data.nbytes
        if kind not in GRIDS:
            layer: PackedLinear = GgmlLinear(spec.in_features, spec.out_features, spec.bias, kind=kind)
            layer.fill(blocks=torch.from_numpy(data))
            return Brought(layer, StoredBits(codes=bits))
        assert data.shape[1] == row_bytes(kind, spec.in_features)
        numbers = numbers_of(kind, torch.from_numpy(data))
        scales = bits - numbers.bits * spec.weights
        return Brought(numbers.layer(spec.bias), StoredBits(codes=bits - scales, scales=scales))


GRIDS = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q8_0": 8}  # -> bits of a code


def numbers_of(kind: str, rows_OB: Tensor) -> Numbers:
    """A matrix of blocks, uint8 [O, bytes], as a grid."""
    bits, rows = GRIDS[kind], len(rows_OB)
    halves = 2 if kind.endswith("_1") else 1  # 16-bit numbers in front of the codes
    body = {4: 16, 5: 20, 8: 32}[bits]
    block_OGB = rows_OB.view(rows, -1, 2 * halves + body)
    half_OGN = block_OGB[:, :, : 2 * halves].contiguous().view(torch.float16)
    code_OGB = block_OGB[:, :, 2 * halves :].int()
    if bits == 8:
        codes = code_OGB ^ 128  # two's complement, as an offset of 128
    else:
        low = code_OGB[:, :, -16:]
        codes = torch.cat([low & 15, low >> 4], dim=2)
        if bits == 5:
            place = torch.arange(GROUP)
            codes = codes | ((code_OGB[:, :, place // 8] >> (place % 8)) & 1) << 4
    minimum_OG = half_OGN[:, :, 1].contiguous() if halves == 2 else None
    return Numbers(bits, GROUP, codes.reshape(rows, -1), half_OGN[:, :, 0].contiguous(), minimum_OG=minimum_OG)


IMPORTER = FromGguf()
