"""Configurations of every format that the fused kernels serve."""

import itertools

UNIFORM = [
    dict(format="uniform", bits=bits, group=group, offset=offset)
    for bits in (2, 3, 4, 5, 8)
    for group, offset in ((64, "symmetric"), (24, "zero"), (0, "minimum"), (128, "zero"))
]
SCALAR = [
    dict(format="codebook", dim=1, index_bits=bits, block=block, scales=scales, table="nf")
    for bits, (block, scales) in itertools.product((2, 3, 4, 5, 6), ((64, "dynamic"), (16, "half"), (24, "dynamic")))
]
VECTOR = [
    dict(format="codebook", dim=dim, index_bits=bits, block=block, scales="double")
    for (dim, bits), block in itertools.product(
        (
            (1, 5),
            (1, 6),
            (1, 7),
            (1, 9),
            (2, 3),
            (2, 5),
            (2, 6),
            (2, 7),
            (2, 8),
            (2, 11),
            (4, 4),
            (4, 8),
            (4, 12),
            (8, 8),
            (8, 10),
        ),
        (64, 24),
    )
]
TRELLIS = [
    dict(format="trellis", bits=bits, dim=dim, window=window, rotated=True, rank=rank)
    for bits, dim, window, rank in (
        (1, 1, 16, 0),
        (3, 2, 12, 4),
        (2, 1, 12, 0),
        (5, 2, 9, 0),
        (3, 1, 12, 3),
        (7, 2, 14, 0),
        (4, 1, 12, 0),
        (5, 1, 8, 0),
    )
]
ADDED = [
    dict(format="uniform", bits=3, group=64, offset="symmetric", rotated=True, rank=3),
    dict(format="uniform", bits=3, group=64, offset="zero", permuted=True, rank=3, adapter_bits=16, row_scales=True),
    dict(
        format="codebook",
        dim=1,
        index_bits=3,
        block=32,
        scales="double",
        scale_bits=3,
        scale_group=16,
        scale_dtype="bfloat16",
        table="nf",
        rank=5,
    ),
    dict(format="codebook", dim=4, index_bits=8, block=64, rank=37, row_scales=True),
    dict(format="uniform", bits=4, group=64, offset="symmetric", column_scales=True),
    dict(format="uniform", bits=3, group=24, offset="zero", permuted=True, column_scales=True, rank=3),
]
