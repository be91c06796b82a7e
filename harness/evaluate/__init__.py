"""Scores of a reloaded compressed model."""
