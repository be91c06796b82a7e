"""Numerics shared by the methods: pure functions from tensors to tensors."""
