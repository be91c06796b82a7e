"""Whole models of random stored bits: memory and tokens a second of a published model's shapes, without its weights.

Speed does not depend on values, only on shapes and forms: what is built here is packed, laid out and run exactly like a
cell's model. Nothing is scored."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from transformers import PretrainedConfig

from harness.compressed import CompressedModel, attach_tables
from harness.model import empty_model, half_dtype, inventory
from kernels.formats.bits import table_spec
from kernels.formats.dense import HALF_DTYPES
from kernels.formats.layer import LayerConfig, LayerSpec
from kernels.formats.packed import PackedLinear
from kernels.formats.tables import Table
from kernels.synthetic import random_layer, random_table

SPREAD = 0.02  # standard deviation of random embeddings and heads, as models are initialised


def uncompressed(config: PretrainedConfig) -> LayerConfig:
    """The configuration of an uncompressed layer of this model."""
    return LayerConfig.of("dense", dtype=half_dtype(config))


def random_model(
    config: PretrainedConfig,
    layers: Mapping[str, LayerConfig],
    device: str,
    dtype: torch.dtype,
    held: int | None = None,
) -> CompressedModel:
    """A model whose layers, by name, have random bits in these configurations; `dtype` is the compute dtype.

    Where memory is short, only the first `held` blocks have bits of their own, and those behind them read these again,
    in turn: a token takes as many bytes through as many products, and every block has its own cache and norms."""
    model = empty_model(type(config)(**config.to_dict()), dtype)  # building a model writes into its configuration
    stock, half = inventory(model), half_dtype(config)
    tables: dict[str, Table] = {}
    held = held or len(stock.blocks)
    lenders: dict[tuple[object, ...], PackedLinear] = {}
    for index, block in enumerate(stock.blocks):
        for place, layer in enumerate(block.layers):
            form = layers[layer.name]
            key = (index % held, place, layer.in_features, layer.out_features, layer.bias, form)
            if key not in lenders:
                lenders[key] = packed = _layer(layer, form, seed=len(lenders))
                if packed.table_key and packed.table_key not in tables:
                    tables[packed.table_key] = random_table(table_spec(packed.spec()))
            model.set_submodule(layer.name, _reader(lenders[key]) if index >= held else lenders[key])
    attach_tables(model, tables)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                values = torch.ones(parameter.shape, dtype=dtype)
                if parameter.ndim > 1:
                    values = values.normal_(std=SPREAD, generator=generator).to(HALF_DTYPES[half]).to(dtype)
                setattr(module, name, nn.Parameter(values, requires_grad=False))
    model.tie_weights()
    model.requires_grad_(False)
    return CompressedModel(model.to(device).eval(), stock, half)


def _layer(layer: LayerSpec, config: LayerConfig, seed: int) -> PackedLinear:
    packed = random_layer(config.to_json(), layer.out_features, layer.in_features, layer.bias, seed)
    if config.format == "dense":  # as a model is initialised: positive weights would add up
        weight = packed.get_buffer("weight")
        packed.refill(weight=weight.sub_(0.06).mul_(0.5))
    return packed


def _reader(lender: PackedLinear) -> PackedLinear:
    """Another layer that reads the same bytes."""
    reader = PackedLinear.from_spec(lender.spec())
    reader.refill(**{name: lender.get_buffer(name) for name in lender.stored_parts()})
    if lender.bias is not None:
        reader.set_bias(lender.bias)
    return reader


def borrowed_bytes(loaded: CompressedModel) -> int:
    """What layers would take that read the bytes of others."""
    buffers = [layer.get_buffer(name) for layer in loaded.packed.values() for name in layer.stored_parts()]
    own = {buffer.data_ptr(): buffer.nbytes for buffer in buffers}
    return sum(buffer.nbytes for buffer in buffers) - sum(own.values())
