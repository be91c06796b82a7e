"""Packed weight formats and the products that run on them.

A compressed linear layer is a `PackedLinear`: a module whose buffers are exactly the bytes that are stored. Everything
else (the bit ledger, the checkpoint, the score, the latency) is read off those buffers.

This package imports neither `methods` nor `harness`, and carries no version attribute: transformers probes for an
unrelated package of the same name, and must not mistake this one for it (tests/kernels/test_import.py)."""
