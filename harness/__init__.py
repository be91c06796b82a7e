"""Compare post-training quantisation methods for language models under one stored-bit budget."""

__version__ = "0.1.0"
