"""Results by content key: a folder per cell, and the typed records in it."""
