"""Where compressed models leave for the places people run models in, and other people's come in to be judged.

Each format is a file, and a line in `EXPORTS` or `IMPORTS`. An exporter refuses by name what its format cannot hold,
and writes nothing else than the numbers a cell stores; an importer turns the tensors of a checkpoint into packed layers
and says how many bits the checkpoint itself spends on them."""

from __future__ import annotations

from kernels.registry import Registry

QUANT_METHOD = "ptq-harness"  # what config.json of an `hf` export says its weights are
EXPORTS: Registry = Registry(
    "format to export",
    "harness.portal.folder:Exporter",
    {
        "hf": "harness.portal.hf:EXPORTER",
        "gptq": "harness.portal.gptq:EXPORTER",
        "compressed-tensors": "harness.portal.compressed_tensors:EXPORTER",
        "bnb": "harness.portal.bnb:EXPORTER",
        "gguf": "harness.portal.gguf:EXPORTER",
    },
    group="ptq_harness.exports",
)

# By what a checkpoint's configuration calls its quantisation.
IMPORTS: Registry = Registry(
    "format of checkpoints",
    "harness.portal.foreign:Importer",
    {
        "gptq": "harness.portal.gptq:IMPORTER",
        "auto-round": "harness.portal.gptq:IMPORTER",
        "compressed-tensors": "harness.portal.compressed_tensors:IMPORTER",
        "awq": "harness.portal.awq:IMPORTER",
        "bitsandbytes": "harness.portal.bnb:IMPORTER",
        "hqq": "harness.portal.hqq:IMPORTER",
        "gguf": "harness.portal.gguf:IMPORTER",
    },
    group="ptq_harness.imports",
)
