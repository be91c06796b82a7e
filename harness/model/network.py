"""The modules of a model: from a configuration alone, on the meta device, or with its weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from harness.data.checkpoint import view
from harness.model.families import require_supported
from harness.model.linear_layers import with_linear_layers
from harness.model.shapes import PRESETS, BlockSpec, Inventory, role_of
from harness.progress import first_line, lacks_memory
from kernels.formats.layer import LayerSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


MOST_BLOCKS = 10_000  # whose layers are laid out one by one, if without weights


def decoder_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """(dotted name, list) of the decoder blocks. Raises ValueError for a model that has none."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise ValueError(
        f"{type(model).__name__} has no list of {count} decoder blocks; only decoder-only language models are supported"
    )


def states_of(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The hidden states a block gives, alone or in front of others."""
    return out if isinstance(out, Tensor) else out[0]


def in_place_of_states(out: Tensor | tuple[Tensor, ...], hidden: Tensor) -> Tensor | tuple[Tensor, ...]:
    """What a block gives, with these hidden states."""
    return hidden if isinstance(out, Tensor) else (hidden, *out[1:])


def decoder_name(model: PreTrainedModel) -> str:
    """Dotted name of the module that owns the blocks: what it gives is what the head gets."""
    return decoder_blocks(model)[0].rpartition(".")[0]


def decoder(model: PreTrainedModel) -> nn.Module:
    return model.get_submodule(decoder_name(model))


def inventory(model: PreTrainedModel) -> Inventory:
    """Raises ValueError when no block has a linear layer to compress."""
    prefix, modules = decoder_blocks(model)
    blocks, covered = [], set()
    for index, module in enumerate(modules):
        layers = []
        for inside, layer in module.named_modules():
            if isinstance(layer, nn.Linear):
                name = f"{prefix}.{index}.{inside}"
                covered.add(f"{name}.weight")
                role, bias = role_of(name, f"{prefix}.{index}"), layer.bias is not None
                layers.append(LayerSpec(name, role, layer.out_features, layer.in_features, bias))
        blocks.append(BlockSpec(f"{prefix}.{index}", tuple(layers)))
    if not covered:
        raise ValueError(
            f"{type(model).__name__} keeps no nn.Linear in its decoder blocks; nothing here can compress it"
        )
    uncovered, rest = {}, 0
    for name, parameter in model.named_parameters():  # tied parameters appear once
        if name in covered:
            continue
        if name.startswith(f"{prefix}.") and parameter.ndim >= 2:
            uncovered[name] = parameter.numel()
        else:
            rest += parameter.numel()
    return Inventory(tuple(blocks), uncovered, rest)


def read_config(source: str | Path, revision: str | None = None) -> PretrainedConfig:
    """A preset name, or the config.json of a folder or hub id."""
    from transformers import AutoConfig

    if str(source) in PRESETS:
        values = dict(PRESETS[str(source)])
        return AutoConfig.for_model(values.pop("model_type"), **values)
    try:
        config = AutoConfig.from_pretrained(str(source), revision=revision, trust_remote_code=False)
    except Exception as error:  # a configuration's own checks raise what they like
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"'{source}' brings code of its own, which is never run here: only architectures of transformers are"
            ) from None
        raise ValueError(
            f"no configuration of '{source}' can be read ({first_line(error)}): "
            f"give a local folder or a hub id; presets are {', '.join(PRESETS)}"
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{source} is already quantised (its config.json says how): give the unquantised model")
    return config


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """The model with shapes only. Raises ValueError for a type of model that cannot be run here, or of such sizes."""
    from transformers import AutoModelForCausalLM

    require_supported(config)
    count = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if not isinstance(count, int) or count > MOST_BLOCKS:
        raise ValueError(f"config.json asks for {str(count)[:20]} decoder blocks: more than any model has")
    try:
        with torch.device("meta"):
            return with_linear_layers(AutoModelForCausalLM.from_config(config, trust_remote_code=False))
    except Exception as error:  # a layer's constructor raises what it likes
        raise ValueError(
            f"config.json describes no causal language model that can be built ({first_line(error)}): check its sizes"
        ) from error


def empty_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model without weights, but with the buffers that no checkpoint holds (rotary frequencies)."""
    return with_linear_layers(as_published(config, dtype))


def as_published(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The same with transformers' own modules, whose tensors are those of a checkpoint."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)


def half_dtype(config: PretrainedConfig) -> str:
    """The 16-bit type the uncompressed tensors are kept in: the checkpoint's own, fp16 for an fp32 one.

    `config` must be the file's (read_config): a loaded model's says what it was loaded as.
    """
    return "bfloat16" if config.dtype == torch.bfloat16 else "float16"


def load_reference(path: Path, device: str, dtype: torch.dtype, fingerprint: str = "") -> PreTrainedModel:
    """The model of a folder, of the `fingerprint` if one is given. Raises ValueError when it has another, or when its
    weights and its configuration are not each other's, or are no numbers: transformers would go on with random ones in
    place of what is missing."""
    from transformers import AutoModelForCausalLM

    read_config(path)
    try:
        with view(path, fingerprint) as files:
            model, found = AutoModelForCausalLM.from_pretrained(
                files,
                dtype=dtype,
                output_loading_info=True,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
            )
    except (SafetensorError, OSError, RuntimeError, KeyError) as error:
        if lacks_memory(error):  # there is nothing wrong with the file
            raise MemoryError(first_line(error)) from error
        raise ValueError(f"the weights of {path} cannot be read ({first_line(error)}): copy them again") from error
    require_own(path, "lacks", "that its config.json asks for: its weights are incomplete", found["missing_keys"])
    require_own(path, "holds", "that its config.json has no place for: it is another model's", found["unexpected_keys"])
    mismatched = [key if isinstance(key, str) else key[0] for key in found["mismatched_keys"]]
    require_own(path, "holds", "of other sizes than its config.json says: it is another model's", mismatched)
    require_finite(path, model.state_dict())
    require_weights(path, (p for p in decoder_blocks(model)[1].parameters() if p.ndim >= 2))
    model.config.name_or_path = str(path)  # not the view's
    return with_linear_layers(model).to(device).eval()


def require_own(path: Path, verb: str, problem: str, names: Iterable[str]) -> None:
    """Raises ValueError where there are such tensors."""
    if found := sorted(names):
        raise ValueError(f"{path} {verb} {len(found)} tensors {problem} ({found[0]} first)")


def require_finite(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises ValueError where one of them holds a number that is none."""
    broken = [n for n, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    require_own(path, "holds", "with weights that are no finite numbers: download or train it again", broken)


def require_weights(path: Path, matrices: Iterable[torch.Tensor]) -> None:
    """Raises ValueError where all of a model's matrices are zero."""
    if not any(bool(matrix.any()) for matrix in matrices):
        raise ValueError(f"every matrix of {path} is zero: it was saved before it had weights")


@contextlib.contextmanager
def swapped_module(model: nn.Module, name: str, replacement: nn.Module) -> Iterator[None]:
    original = model.get_submodule(name)
    model.set_submodule(name, replacement)
    try:
        yield
    finally:
        model.set_submodule(name, original)
