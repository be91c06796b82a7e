"""Our exports in transformers: `AutoModelForCausalLM.from_pretrained` makes packed layers of them.

Imported by harness.portal.hook once transformers has its list of quantizers; what it needs of us is imported when a
folder of ours is loaded."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from harness.portal import QUANT_METHOD

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kernels.formats.packed import PackedLinear

KNOWN_VERSION = 1


class PackedConfig(QuantizationConfigMixin):
    """`quantization_config` of an export: every packed layer and shared table by name, complete enough to be built."""

    def __init__(
        self,
        version: int = 0,
        half: str = "float16",
        layers: dict[str, Any] | None = None,
        tables: dict[str, Any] | None = None,
        stored_bpw: float | None = None,
        **unknown: Any,
    ) -> None:
        unknown.pop("quant_method", None)
        if version > KNOWN_VERSION or unknown:
            raise ValueError(f"the folder is of a later ptq-harness (version {version}): update it to load this")
        if not layers:
            raise ValueError(f"quantization_config of a {QUANT_METHOD} folder names no layers: export the cell again")
        self.quant_method = QUANT_METHOD
        self.version, self.half, self.layers, self.tables = version, half, layers, tables or {}
        self.stored_bpw = stored_bpw


class PackedQuantizer(HfQuantizer):
    """Lays packed layers out in the place of linear ones, for transformers to fill."""

    requires_calibration = True  # nothing is compressed on the way in
    quantization_config: PackedConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        from harness.compressed import attach_tables
        from harness.model.linear_layers import with_linear_layers
        from kernels.formats.delta import DeltaLinear
        from kernels.formats.packed import PackedLinear
        from kernels.formats.tables import Table

        with_linear_layers(model)
        for name, spec in self.quantization_config.layers.items():
            layer = PackedLinear.from_spec(spec)
            if isinstance(layer, DeltaLinear):
                layer.keep_base()
            model.set_submodule(name, as_linear(layer))
        attach_tables(model, {key: Table.from_spec(spec) for key, spec in self.quantization_config.tables.items()})
        # The empty tensors that keep a transformers without us from going on (harness.portal.hf).
        placeholders = {rf"^{name.replace('.', '[.]')}[.]weight$" for name in self.quantization_config.layers}
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *placeholders}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        empty = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
        if empty:
            raise ValueError(f"the folder lacks {empty[0]} ({len(empty)} tensors): export the cell again")
        return model

    def is_serializable(self) -> bool:
        return False  # an export has more than a state dict; `harness export` writes it again

    @property
    def is_trainable(self) -> bool:
        return True  # adapters on it are


class _Plain(nn.Linear):
    """nn.Linear by its class alone: without parameters."""

    def __init__(self) -> None:
        nn.Module.__init__(self)


def as_linear(packed: PackedLinear) -> PackedLinear:
    """The layer, of a class that is a linear layer too, `weight` decoded when it is asked for: what peft, and whoever
    else looks for linear layers, takes it for. A layer that stores its weight has it already."""
    format: Any = type(packed)
    packed.__class__ = _linear_class(format)
    packed.__dict__["_is_hf_initialized"] = True  # else transformers would draw a weight at random
    return packed


@cache
def _linear_class(format: Any) -> type[PackedLinear]:
    def weight(self: Any) -> Tensor:
        return self.decode()

    own = {} if "weight" in format.part_of else {"weight": property(weight)}
    return type(format.__name__, (format, _Plain), {"__module__": format.__module__, **own})
