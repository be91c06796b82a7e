"""Memory and latency, on the stored tensors that were scored.

machine       which one it is, and that nothing else of ours runs meanwhile
runner        one model runner for all: a static cache, a token at a time
layers        single products, on copies beyond the last cache
measurement   all of it on one cell, in a process of its own

Rounds, spreads and bandwidths are those of kernels.timing.
"""
