"""The loss that adapters are trained on: how far the compressed model's next-token distribution has gone from the
uncompressed model's (distillation; Hinton, Vinyals, Dean, arXiv 1503.02531), or the loss of the next token itself.

    KL(p || q) = sum_v p_v (log p_v - log q_v)        p the uncompressed model's, q the compressed one's
    dKL / dz   = q - p                                z the compressed model's logits

As in scoring (harness.evaluate.score), the uncompressed model is remembered by its hidden states in front of the head,
which is the same 16-bit tensor for both: they are computed before anything is compressed, so that two models are never
held at once, and kept on disk, a file for every window. Since the gradient of the logits is known, no graph goes
through a softmax, and every slice of tokens is taken through the head and back before the next one: logits exist for a
few hundred tokens at a time, nothing is computed twice, and the blocks get their gradient in one pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from harness.compress.forward import BlockInputs, stubbed_blocks
from harness.data.sealed import believed, checked, load_tensors, save_tensors
from harness.model import decoder_blocks
from harness.model.head import head_of, hidden_states
from harness.model.paging import pages_of
from harness.progress import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel


SLICE_LOGITS = 1 << 24  # of a model, held at once (64 MiB in fp32)


@torch.no_grad()
def remember_states(model: PreTrainedModel, tokens_NT: Tensor, folder: Path, progress: Progress = silent) -> None:
    """Write the states [T - 1, H] of every window, in the model's own dtype; what is there, and whole, stays."""
    lacking = [index for index in range(len(tokens_NT)) if believed(states_file(folder, index), checked) is None]
    done = len(tokens_NT) - len(lacking)
    progress("remember", done, len(tokens_NT))
    for index, states_NH in zip(lacking, _states(model, tokens_NT[lacking], folder), strict=True):
        save_tensors(states_file(folder, index), {"states": states_NH})
        done += 1
        progress("remember", done, len(tokens_NT))


def _states(model: PreTrainedModel, tokens_NT: Tensor, folder: Path) -> Iterator[Tensor]:
    """In front of the head, window by window; of a model that is not in memory every block is read once."""
    tokens_NT = tokens_NT.to(next(model.parameters()).device)
    if pages_of(model) is None or not len(tokens_NT):
        for window_T in tokens_NT:
            yield hidden_states(model, window_T[None], len(window_T))
        return
    inputs = BlockInputs(model, tokens_NT, folder)
    for index in range(len(decoder_blocks(model)[1])):
        inputs.advance(index)
    with stubbed_blocks(model, inputs.returns_tuple) as stubs:
        for window_T, behind_NTH in zip(tokens_NT, inputs.hidden.split(1), strict=True):
            stubs[-1].replay = behind_NTH
            yield hidden_states(model, window_T[None], len(window_T))


def states_file(folder: Path, index: int) -> Path:
    return folder / f"window_{index:05d}.safetensors"


def backward_from_divergence(model: PreTrainedModel, window_T: Tensor, file: Path, windows: int) -> float:
    """Add to the gradients of the parameters that of a window's mean divergence, one of `windows` of a step; returns
    its share of the step's loss. `file` holds the uncompressed model's states of the window.

    Raises Damaged when they are not what was written: the next run makes them again."""
    with arithmetic(model):
        hidden_PH = hidden_states(model, window_T[None], len(window_T))
    ahead_PH = hidden_PH.detach().requires_grad_()  # what the head's gradients are collected in
    original_PH = load_tensors(file)[0]["states"].to(hidden_PH)
    rows = slice_tokens(model.config.get_text_config().vocab_size)
    share, total = 1 / (windows * len(hidden_PH)), 0.0
    head = head_of(model)
    for ahead_NH, original_NH in zip(ahead_PH.split(rows), original_PH.split(rows), strict=True):
        with arithmetic(model):
            logits_NV = head(ahead_NH)
        with torch.no_grad():
            with arithmetic(model):
                log_p_NV = head(original_NH).log_softmax(dim=-1)
            log_q_NV = logits_NV.log_softmax(dim=-1)
            p_NV = log_p_NV.exp()
            total += share * torch.linalg.vecdot(p_NV, log_p_NV - log_q_NV).sum().item()
            gradient_NV = log_q_NV.exp_().sub_(p_NV).mul_(share)
        logits_NV.backward(gradient_NV)
    hidden_PH.backward(ahead_PH.grad)
    return total


def backward_from_next_token(model: PreTrainedModel, window_T: Tensor, windows: int) -> float:
    """The same for the mean loss of a window's next tokens."""
    with arithmetic(model):
        loss: Tensor = model(input_ids=window_T[None], labels=window_T[None], use_cache=False).loss / windows
    loss.backward()
    return loss.item()


def slice_tokens(vocabulary: int) -> int:
    """Tokens whose logits are held at once."""
    return max(1, SLICE_LOGITS // vocabulary)


def arithmetic(model: PreTrainedModel) -> AbstractContextManager[None]:
    """fp16 gradients of small losses vanish; bf16 has fp32's range (QLoRA's own advice)."""
    device = next(model.parameters()).device.type
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda" or model.dtype == torch.float16)
