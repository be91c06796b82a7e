"""Where cells run: one process per cell, so that one crash is one failed row.

`local` is this machine. The others (`ENGINES`) hand cells to machines that share the cache, each in a module with one
function, `run_cells(specs, watch, timeout_s, memory_gib, options)`."""

ENGINES = {"ray": "harness.engine.on_ray", "slurm": "harness.engine.on_slurm"}
