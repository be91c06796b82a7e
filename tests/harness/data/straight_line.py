"""WikiText-2 perplexity in a straight line, sharing no code with the harness: python straight_line.py MODEL TEXT_FILE
CONTEXT WINDOWS

Prints the mean negative log-likelihood of each of the first WINDOWS windows (0: all), in nats per token, then the
perplexity."""

import math
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, text_file, context, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
# The data set has one row per line, where a line of one blank is an empty row; papers join the rows by a blank line.
lines = Path(text_file).read_bytes().decode("utf-8").removesuffix("\n").split("\n")
text = "\n\n".join("" if line == " " else line + "\n" for line in lines)
ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
losses = []
for start in range(0, ids.shape[1] - context + 1, context)[: count or None]:
    window = ids[:, start : start + context]
    with torch.no_grad():
        losses.append(model(window, labels=window).loss.item())
    print(losses[-1], flush=True)
print(math.exp(sum(losses) / len(losses)))
