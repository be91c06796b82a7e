"""What a GGUF file calls itself, `general.file_type`, beside the types its tensors are of.

Files of one name are mixtures: a Q4_K_M has some matrices of Q6_K. So a name is held to be true where more weights of
the blocks are of the type it stands for than of any other. It often is not where the rows of a model are no multiple of
256: llama.cpp then stores another type (Q4_0 for Q2_K), and the file keeps its name."""

from __future__ import annotations

from collections import Counter

GUESSED = 1024  # from here on a number says that nobody declared a type
PREFIX, SIZES = "MOSTLY_", ("_S", "_M", "_L")
# Names that stand for a type of another name; of all others the type is the name, less its size (Q3_K_L).
MAIN_TYPE = {
    "ALL_F32": "F32",
    "IQ2_S": "IQ2_XS",
    "IQ2_M": "IQ2_S",
    "IQ3_XS": "IQ3_S",
    "IQ3_M": "IQ3_S",
    "MXFP4_MOE": "MXFP4",
}


def declared(said: int) -> tuple[str, str]:
    """(what the file calls itself, the type of ggml that stands for; empty where gguf does not know the number)."""
    from gguf import GGMLQuantizationType, LlamaFileType

    if said not in iter(LlamaFileType):
        return f"file type {said}", ""
    name = LlamaFileType(said).name.removeprefix(PREFIX)
    kind = MAIN_TYPE.get(name, name)
    if kind not in GGMLQuantizationType.__members__ and kind.endswith(SIZES):
        kind = kind[:-2]
    return name, kind


def mislabelled(said: object, weights: Counter[str]) -> str:
    """In words, which types the block weights are of (their numbers by type), where most are not of the type that the
    file says; empty where they are, or it says nothing."""
    if not isinstance(said, int) or said >= GUESSED:
        return ""
    name, kind = declared(said)
    if weights.most_common(1)[0][0] == kind:
        return ""
    total = weights.total()
    shares = ", ".join(f"{count / total:.0%} {found}" for found, count in weights.most_common())
    return f"declared {name}, but its block weights are {shares}"
