"""Tokens a second beside llama.cpp's: the same shapes, alternating rounds of one run, the same threads.

    cmake -B build -DGGML_NATIVE=ON -DCMAKE_BUILD_TYPE=Release
    cmake --build build --target llama-bench llama-quantize
    python benchmarks/llama_cpp.py --llama-bench build/bin/llama-bench --model smollm2-135m --out results/cpu-llama-cpp

llama.cpp gets a GGUF of the shapes with random weights (no tokenizer), quantised by its own llama-quantize; we get
random stored bits in the configurations that methods give at a budget (harness.measure.end_to_end). Speed depends on
neither. Bits per weight are counted on both sides from the stored tensors of the blocks' matrices. A row of ours
is compared with the llama.cpp type of least bits that has at least as many as it; where none has, with the one of most.
Both read a context of 128 tokens first.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import gguf
import numpy as np
import torch
from transformers import PretrainedConfig

from harness.data.files import write_text
from harness.measure.end_to_end import random_model, uncompressed
from harness.measure.machine import quiet
from harness.measure.runner import CONTEXT, Runner, bytes_per_token, prompt, read_prompt, timed_model
from harness.model import inventory, read_config, skeleton
from harness.plan.allocation import uniform
from harness.plan.budgets import parse_budget
from harness.report.sheet import Sheet
from kernels.cpu.build import _instructions
from kernels.timing import bandwidth, seconds_of, speed_up, spread
from methods import parse_method

TYPES = ("F16", "Q8_0", "Q4_0", "Q4_K_S", "Q3_K_S", "Q2_K", "IQ3_XXS")
COLUMNS = {  # of the CSV file -> of the table
    "engine": "engine",
    "form": "form",
    "stored_bpw": "stored bits",
    "decode_tok_s_b1": "tok/s",
    "mb_per_token": "MB a token",
    "bandwidth_pct": "% of bandwidth",
    "against": "against",
    "speedup": "times as fast",
    "prefill_tok_s": "prompt tok/s",
}
TOKENS = 64  # of a round
PROMPT_EVERY = 3  # rounds


@dataclass
class Entry:
    """One side of the comparison: what it stores, and seconds of every round (a token; a prompt of 512)."""

    name: str
    stored_bpw: float
    bytes_per_token: int
    token_s: list[float] = field(default_factory=list)
    prompt_s: list[float] = field(default_factory=list)


def write_gguf(config: PretrainedConfig, path: Path) -> None:
    """Random 16-bit weights of a Llama's shapes."""
    writer = gguf.GGUFWriter(path, "llama")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    generator = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        values = generator.standard_normal(shape, dtype=np.float32)
        writer.add_tensor(f"{name}.weight", (values * 0.02).astype(np.float16))

    def add_norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(config.hidden_size, np.float32))

    hidden, inner = config.hidden_size, config.intermediate_size
    add("token_embd", config.vocab_size, hidden)
    add_norm("output_norm")
    if not config.tie_word_embeddings:
        add("output", config.vocab_size, hidden)
    for index in range(config.num_hidden_layers):
        block = f"blk.{index}"
        add_norm(f"{block}.attn_norm")
        add_norm(f"{block}.ffn_norm")
        add(f"{block}.attn_q", heads * head, hidden)
        add(f"{block}.attn_k", kv_heads * head, hidden)
        add(f"{block}.attn_v", kv_heads * head, hidden)
        add(f"{block}.attn_output", hidden, heads * head)
        add(f"{block}.ffn_gate", inner, hidden)
        add(f"{block}.ffn_up", inner, hidden)
        add(f"{block}.ffn_down", hidden, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def matrices(tensors: Iterable[gguf.ReaderTensor]) -> list[gguf.ReaderTensor]:
    """Those of the decoder blocks."""
    return [tensor for tensor in tensors if tensor.name.startswith("blk.") and len(tensor.shape) > 1]


def entry_of(name: str, path: Path) -> Entry:
    """What a GGUF stores: bits a weight of the blocks' matrices, and bytes that a token reads."""
    tensors = gguf.GGUFReader(path).tensors
    blocks = matrices(tensors)
    bits = 8 * sum(int(tensor.n_bytes) for tensor in blocks) / sum(int(tensor.n_elements) for tensor in blocks)
    untied = any(tensor.name == "output.weight" for tensor in tensors)
    read = sum(int(t.n_bytes) for t in tensors if not (untied and t.name == "token_embd.weight"))
    return Entry(name, bits, read)


def llama_bench(tool: Path, path: Path, threads: int, *options: str) -> float:
    """Seconds a token."""
    command = [str(tool), "-m", str(path), "-t", str(threads), "-r", "1", "-o", "json", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)[-1]
    return 1e-9 * result["avg_ns"] / (result["n_gen"] or result["n_prompt"])


def quantised(tool: Path, source: Path, kind: str) -> Path | str:
    """The file in a type of llama.cpp's; or why there is none."""
    if kind == "F16":
        return source
    path = source.with_name(f"{kind}.gguf")
    done = subprocess.run([str(tool), str(source), str(path), kind], capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if "error" in line.lower() or "not" in line]
        return (lines or ["failed"])[0].strip()
    count = len(matrices(gguf.GGUFReader(path).tensors))
    fallen = len(re.findall("falling back to", done.stdout + done.stderr))
    return f"not possible: {fallen} of its tensors fall back to other types" if fallen > count / 2 else path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-bench", type=Path, required=True)
    parser.add_argument("--llama-quantize", type=Path, help="default: beside llama-bench")
    parser.add_argument("--model", default="smollm2-135m", help="a preset or a folder of the Llama family")
    parser.add_argument("--methods", default="rtn")
    parser.add_argument("--bits", default="4.25,3.25,2.25")
    parser.add_argument("--types", default=",".join(TYPES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = read_config(arguments.model)
    with tempfile.TemporaryDirectory() as scratch, quiet():
        compare(arguments, config, Path(scratch))


def compare(arguments: argparse.Namespace, config: PretrainedConfig, scratch: Path) -> None:
    source = scratch / "F16.gguf"
    write_gguf(config, source)
    tool = arguments.llama_quantize or arguments.llama_bench.with_name("llama-quantize")
    files, refused = {}, {}
    for kind in arguments.types.split(","):
        made = quantised(tool, source, kind)
        if isinstance(made, Path):
            files[kind] = made
        else:
            refused[kind] = made
    theirs = {kind: entry_of(kind, path) for kind, path in files.items()}

    stock = inventory(skeleton(config))
    rows = {"uncompressed": dict.fromkeys((layer.name for layer in stock.layers), uncompressed(config))}
    for method in arguments.methods.split(","):
        for text in arguments.bits.split(","):
            rows[f"{method} {text}"] = uniform(parse_method(method), stock, parse_budget(text)).layers
    ours, models = {}, {}
    for name, layers in rows.items():
        loaded = random_model(config, layers, "cpu", torch.float32)
        ours[name] = Entry(name, loaded.ledger().stored_bpw, 0)
        models[name] = timed_model(loaded)
        ours[name].bytes_per_token = bytes_per_token(loaded)

    limit = bandwidth("cpu")
    for done in range(arguments.rounds):
        for name in [*theirs, *ours] if done % 2 == 0 else [*reversed(ours), *reversed(theirs)]:
            if name in theirs:
                run = partial(llama_bench, arguments.llama_bench, files[name], arguments.threads)
                theirs[name].token_s.append(run("-p", "0", "-n", str(TOKENS), "-d", str(CONTEXT)))
                if done % PROMPT_EVERY == 0:
                    theirs[name].prompt_s.append(run("-p", "512", "-n", "0"))
            else:
                model = models[name]
                runner = Runner(model, prompt(model, 1, CONTEXT), steps=TOKENS + 2)
                runner.warm()
                ours[name].token_s.append(
                    seconds_of(lambda r=runner: [r.step() for _ in range(TOKENS)], "cpu") / TOKENS
                )
                if done % PROMPT_EVERY == 0:
                    ids = prompt(model, 1, 512)
                    ours[name].prompt_s.append(
                        seconds_of(lambda m=model, i=ids: read_prompt(m, i), "cpu") / ids.shape[1]
                    )
        limit = max(limit, bandwidth("cpu"))
    lines = [line(entry, "llama.cpp", None, limit) for entry in theirs.values()]
    lines += [line(entry, "harness", rival(entry, theirs.values()), limit) for entry in ours.values()]
    notes = [
        f"{arguments.model}, {arguments.threads} threads, {arguments.rounds} rounds, {limit / 1e9:.0f} GB/s.",
        f"harness: {', '.join(_instructions())}",
        *(f"{kind}: {reason}" for kind, reason in refused.items()),
    ]
    text = Sheet(list(COLUMNS.values()), lines).markdown() + "\n" + "\n".join(f"* {note}" for note in notes) + "\n"
    print(text)
    if arguments.out:
        stem = f"llama_cpp-{Path(arguments.model).name}"
        write_text(arguments.out / f"{stem}.md", text)
        with open(arguments.out / f"{stem}.csv", "w", newline="") as handle:
            csv.writer(handle, lineterminator="\n").writerows([COLUMNS, *lines])


def rival(entry: Entry, theirs: Iterable[Entry]) -> Entry:
    """llama.cpp's type of least bits that has at least as many; where none has, the one of most."""
    ordered = sorted(theirs, key=lambda other: other.stored_bpw)
    return next((other for other in ordered if other.stored_bpw >= entry.stored_bpw - 1e-9), ordered[-1])


def line(entry: Entry, engine: str, other: Entry | None, limit: float) -> list[str]:
    seconds = median(entry.token_s)
    ratio = speed_up(entry.token_s, other.token_s) if other else None
    return [
        engine,
        entry.name,
        f"{entry.stored_bpw:.3f}",
        f"{1 / seconds:.1f} [{1 / spread(entry.token_s)['p90']:.1f}, {1 / spread(entry.token_s)['p10']:.1f}]",
        f"{entry.bytes_per_token / 1e6:.0f}",
        f"{100 * entry.bytes_per_token / seconds / limit:.0f}",
        other.name if other else "",
        f"{ratio['median']:.2f} [{ratio['p10']:.2f}, {ratio['p90']:.2f}]" if ratio else "",
        f"{1 / median(entry.prompt_s):.0f}",
    ]


if __name__ == "__main__":
    main()
