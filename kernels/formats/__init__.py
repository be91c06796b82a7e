"""What is stored: formats of layers, tables they share, and how both decode and encode.

Formats are found by name in `kernels.formats.packed.FORMATS`, tables in `kernels.formats.tables.TABLES`."""
