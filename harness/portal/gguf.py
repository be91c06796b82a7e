"""`gguf`: the file of llama.cpp. A cell of uniform grids leaves in it, and any file of it comes in.

Types of one scale (and minimum) to 32 weights are plain grids and become them, without a change of a number; all others
that the `gguf` package decodes are kept as the blocks they are (kernels.formats.ggml).

    Q4_0  fp16 d; 32 codes of 4 bits, w = d * (q - 8)      Q5_0  likewise of 5 bits, d * (q - 16)
    Q4_1  fp16 d, m; w = d * q + m                         Q5_1  likewise of 5 bits
    Q8_0  fp16 d; 32 signed bytes, w = d * q

Code j of the lower half of a block shares a byte with code j + 16; fifth bits stand apart, 32 in a word. Llama's and
Mistral's rows of queries and keys are in an order of their own there (two interleaved halves of every head)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from harness.data.checkpoint import CONFIG
from harness.data.files import atomic_path, write_text
from harness.portal.card import card
from harness.portal.folder import CellReader, Exporter, Request, claim
from harness.portal.foreign import Brought, Checkpoint, Importer
from harness.portal.gguf_label import mislabelled
from harness.portal.uniform import Numbers, of_layer
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
SPLITTING = {("ByteLevel",): "gpt-2", ("Digits", "ByteLevel"): "smollm"}  # steps of a pre-tokenizer -> llama.cpp's name
TOKEN_TYPES = (1, 4, 3)  # normal, added, special (llama.cpp's LLAMA_TOKEN_TYPE)
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
        require_same(partial(_field, reader), path, config)
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
        self.kinds: Counter[str] = Counter()  # type -> weights of blocks that were read
        self.said = _field(reader, "general.file_type")

    def __exit__(self, *raised: object) -> None:
        self._tensors.clear()  # the file is mapped as long as somebody has one

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def raw(self, name: str, rows: int, columns: int) -> tuple[str, np.ndarray]:
        """(type, the bytes of every row [O, B], rows in the order of transformers)."""
        tensor = self._tensor(name)
        if tuple(int(n) for n in reversed(tensor.shape)) != (rows, columns):
            found = [int(n) for n in reversed(tensor.shape)]
            raise ValueError(f"{self.path}: {name} is {found} where {[rows, columns]} belongs: it is of another model")
        data = np.array(tensor.data).view(np.uint8).reshape(rows, -1)  # a copy: the file is mapped to be read
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


def require_same(field: Callable[[str], Any], path: Path, config: Any) -> None:
    """Raises ValueError where the file's fields are not those of a model of this configuration."""
    said, wanted = field("general.architecture"), ARCHITECTURES.get(config.model_type)
    if wanted is None:
        raise ValueError(f"models of type {config.model_type} are not read from GGUF; {', '.join(ARCHITECTURES)} are")
    if said != wanted:
        raise ValueError(f"{path} is of architecture '{said}', --model of '{wanted}': give the model it is of")
    sizes = {
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
    }
    for name, ours in sizes.items():
        found = field(f"{said}.{name}")
        if found is not None and found != ours:
            raise ValueError(f"{path} has {name} {found}, --model {ours}: give the model it is of")


def _field(reader: Any, name: str) -> Any:
    field = reader.fields.get(name)
    return field.contents() if field is not None else None


class FromGguf(Importer):
    def open(self, path: Path, model: PreTrainedModel) -> GgufFile:
        return GgufFile(path, model)

    def mislabelled(self, checkpoint: Checkpoint) -> str:
        assert isinstance(checkpoint, GgufFile)
        return mislabelled(checkpoint.said, checkpoint.kinds)

    def layer(self, checkpoint: Checkpoint, spec: LayerSpec) -> Brought | None:
        assert isinstance(checkpoint, GgufFile)
        kind, data = checkpoint.raw(f"{spec.name}.weight", spec.out_features, spec.in_features)
        checkpoint.kinds[kind] += spec.weights
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


def blocks_of(numbers: Numbers) -> tuple[str, Tensor] | None:
    """(type, blocks as uint8 [O, bytes]), the inverse of `numbers_of`; None for a grid that no type is."""
    if numbers.group != GROUP or numbers.order_I is not None or numbers.codes_OI.shape[1] % GROUP:
        return None
    kind = {
        (4, "symmetric"): "Q4_0",
        (4, "minimum"): "Q4_1",
        (5, "symmetric"): "Q5_0",
        (5, "minimum"): "Q5_1",
        (8, "symmetric"): "Q8_0",
    }.get((numbers.bits, numbers.offset))
    if kind is None:
        return None
    code_OGS = numbers.codes_OI.view(len(numbers.codes_OI), -1, GROUP)
    halves = [numbers.scale_OG, *([] if numbers.minimum_OG is None else [numbers.minimum_OG])]
    parts = [torch.stack(halves, dim=2).view(torch.uint8)]
    if numbers.bits == 8:
        parts.append((code_OGS ^ 128).to(torch.uint8))
    else:
        if numbers.bits == 5:
            fifth_OG48 = (code_OGS >> 4).unflatten(2, (4, 8)) << torch.arange(8)
            parts.append(fifth_OG48.sum(dim=3).to(torch.uint8))
        low_OGS = code_OGS & 15
        parts.append((low_OGS[:, :, :16] | low_OGS[:, :, 16:] << 4).to(torch.uint8))
    return kind, torch.cat(parts, dim=2).flatten(1)


class Gguf(Exporter):
    """One file, for llama.cpp and all that is built on it."""

    def write(self, request: Request) -> None:
        from gguf import GGMLQuantizationType

        cell, reader = request.cell, CellReader(request.cell)
        config = json.loads((cell.store.folder / CONFIG).read_text(encoding="utf-8"))
        if (architecture := ARCHITECTURES.get(config["model_type"])) is None:
            raise ValueError(f"models of type {config['model_type']} are not written as GGUF: write --format hf")
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
        kinds: dict[str, str] = {}
        for name, spec in reader.description.layers.items():
            if spec["format"] == "dense":
                kinds[name] = "F16" if reader.description.half == "float16" else "BF16"
                continue
            found = blocks_of(of_layer(reader.layer(name), name, "gguf"))
            if found is None:
                raise ValueError(
                    f"{name} is a grid that no type of GGUF is (4, 5 or 8 bits in groups of {GROUP}, symmetric, or 4 "
                    "and 5 with a minimum): `run --methods rtn:bits=4,group=32,offset=symmetric --allocate uniform` "
                    "makes such a cell"
                )
            kinds[name] = found[0]
        words = vocabulary(cell.artifact.spec.model.path, config["vocab_size"])

        def blocks(name: str) -> tuple[np.ndarray, str]:
            """A matrix of a block, rows in llama.cpp's order."""
            if kinds[name] in FLOATS:
                rows = dict(reader.packed())[f"{name}.weight"].view(torch.int16).numpy().view(np.uint8)
            else:
                found = blocks_of(of_layer(reader.layer(name), name, "gguf"))
                assert found is not None
                rows = found[1].numpy()
            count = heads.get(name.rpartition(".")[2]) if architecture in PERMUTED else None
            if count:
                rows = rows.reshape(count, 2, len(rows) // count // 2, -1).swapaxes(1, 2).reshape(len(rows), -1)
            return rows, kinds[name]

        claim(request, "gguf")
        most = Counter(kinds.values()).most_common(1)[0][0]
        with atomic_path(request.folder / f"model-{most}.gguf") as path:
            _write(path, architecture, config, words, most, reader, kinds, blocks)
        assert most in GGMLQuantizationType.__members__
        write_text(request.folder / "README.md", card(cell, "gguf", f"# llama-cli -m model-{most}.gguf"))


def _write(
    path: Path,
    architecture: str,
    config: dict[str, Any],
    words: dict[str, Any],
    most: str,
    reader: CellReader,
    kinds: dict[str, str],
    blocks: Callable[[str], tuple[np.ndarray, str]],
) -> None:
    from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, LlamaFileType, get_tensor_name_map

    names = get_tensor_name_map(MODEL_ARCH[architecture.upper()], config["num_hidden_layers"])
    file_type = {"F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16"}.get(most, f"MOSTLY_{most}")
    writer = GGUFWriter(path, architecture)
    writer.add_file_type(LlamaFileType[file_type])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_rope_dimension_count(width)
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(
            f"positions are scaled by '{rope['rope_type']}', which is not written as GGUF: write --format hf"
        )
    writer.add_rope_freq_base(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    writer.add_vocab_size(config["vocab_size"])
    for add, value in words.items():
        getattr(writer, f"add_{add}")(value)

    def tensors() -> Iterator[tuple[str, np.ndarray, str]]:
        for name in kinds:
            yield f"{names.get_name(name)}.weight", *blocks(name)
        for name, tensor in reader.rest():
            owner, _, leaf = name.rpartition(".")
            values = tensor.float().numpy() if tensor.ndim == 1 else tensor.view(torch.int16).numpy()
            kind = "F32" if tensor.ndim == 1 else "F16" if tensor.dtype == torch.float16 else "BF16"
            rows = values.view(np.uint8) if tensor.ndim > 1 else values
            yield f"{names.get_name(owner)}.{leaf}", rows, kind

    for name, rows, kind in tensors():  # sizes first: the file begins with where everything is
        writer.add_tensor_info(name, rows.shape, rows.dtype, rows.nbytes, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, rows, _ in tensors():
        writer.write_tensor_data(rows)
    writer.close()


def vocabulary(model: Path, size: int) -> dict[str, Any]:
    """What GGUFWriter is to add of a tokenizer, by its methods' names. Raises ValueError for one that llama.cpp splits
    texts by another rule for, or that is none of byte pairs."""
    file = model / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{model} holds no tokenizer.json, from which a GGUF's tokenizer is made")
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    splitting = tokenizer.get("pre_tokenizer") or {}
    steps = [step["type"] for step in splitting.get("pretokenizers", [splitting]) if "type" in step]
    rule = SPLITTING.get(tuple(steps))
    if tokenizer["model"]["type"] != "BPE" or rule is None or tokenizer.get("normalizer"):
        raise ValueError(f"the tokenizer splits texts by {'+'.join(steps) or 'nothing'}, which is not written as GGUF")
    tokens = {number: text for text, number in tokenizer["model"]["vocab"].items()}
    added = {token["id"]: token for token in tokenizer["added_tokens"]}
    tokens |= {number: token["content"] for number, token in added.items()}
    special = [number for number, token in added.items() if token["special"]]
    types = [TOKEN_TYPES[2 if n in special else 1 if n in added else 0] if n in tokens else 5 for n in range(size)]
    settings = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    numbers = {text: number for number, text in tokens.items()}
    known = {name: numbers.get(_content(settings.get(f"{name}_token"))) for name in ("bos", "eos", "pad", "unk")}
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in tokenizer["model"]["merges"]]
    return {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": rule,
        "token_list": [tokens.get(number, f"[PAD{number}]") for number in range(size)],
        "token_types": types,
        "token_merges": merges,
        "add_bos_token": False,
        **{f"{name}_token_id": number for name, number in known.items() if number is not None},
    }


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else str(token)


EXPORTER, IMPORTER = Gguf(), FromGguf()
