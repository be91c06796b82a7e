"""Where cells run: one process per cell, so that one crash is one failed row."""
