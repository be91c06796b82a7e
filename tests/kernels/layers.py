"""Layers of random stored bytes, of every format that the fused kernels serve."""

import itertools

import torch

from kernels.packed import PackedLinear

UNIFORM = [
    dict(format="uniform", bits=bits, group=group, offset=offset)
    for bits in (2, 3, 4, 5, 8)
    for group, offset in ((64, "symmetric"), (24, "zero"), (0, "minimum"), (128, "zero"))
]
SCALAR = [
    dict(format="codebook", dim=1, index_bits=bits, block=block, scales=scales, table="nf")
    for bits, (block, scales) in itertools.product((2, 3, 4), ((64, "dynamic"), (16, "half"), (24, "dynamic")))
]
VECTOR = [
    dict(format="codebook", dim=dim, index_bits=bits, block=block, scales="double")
    for (dim, bits), block in itertools.product(((1, 5), (1, 6), (2, 3), (2, 5), (2, 6), (2, 8), (4, 8), (4, 12), (8, 8)), (64, 24))
]
ADDED = [
    dict(format="uniform", bits=3, group=64, offset="zero", permuted=True, rank=3, adapter_bits=16, row_scales=True),
    dict(
        format="codebook", dim=1, index_bits=3, block=32, scales="double", scale_bits=3, scale_group=16, scale_dtype="bfloat16",
        table="nf", rank=5,
    ),
    dict(format="codebook", dim=4, index_bits=8, block=64, rank=4, row_scales=True),
]  # fmt: skip


def random_layer(spec: dict, rows: int, columns: int, bias: bool, seed: int = 0) -> PackedLinear:
    """Any stored bits are a layer; padding in the bit streams is random too."""
    generator = torch.Generator().manual_seed(seed)
    layer = PackedLinear.from_spec({**spec, "in_features": columns, "out_features": rows, "bias": bias}, "cpu")
    tensors = {}
    for name in layer.stored_parts():
        like = layer.get_buffer(name)
        if name == "order":
            tensors[name] = torch.randperm(columns, generator=generator).to(torch.int16)
        elif like.is_floating_point():
            tensors[name] = (0.01 + 0.1 * torch.rand(like.shape, generator=generator)).to(like.dtype)
        else:
            limits = torch.iinfo(like.dtype)
            tensors[name] = torch.randint(limits.min, limits.max + 1, like.shape, generator=generator, dtype=torch.int64).to(like.dtype)
    layer.fill(**tensors)
    if bias:
        layer.set_bias(torch.randn(rows, generator=generator))
    return layer
