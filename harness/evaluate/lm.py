"""lm-eval's view of a model in memory: its own Hugging Face wrapper, tokenisation and all, with another way to get
log-likelihoods.

Imported only where tasks are scored: it needs lm-eval.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable
from typing import TYPE_CHECKING

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from harness.evaluate.branches import Scored, Text, follows_branches, log_likelihoods, longest_tree, plant
from harness.model.families import known_positions
from harness.progress import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Tokenized = tuple[tuple[str, str], list[int], list[int]]  # (context, continuation), and the token ids of both


class BranchingLM(HFLM):
    """Scores the answers to one question together (harness.evaluate.branches), where the model can; the numbers are
    HFLM's but for rounding. `progress` counts tokens, and hears of the `phase`."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        # It warns of every model that is not given by its name.
        logging.getLogger("lm_eval.models.huggingface").setLevel(logging.ERROR)
        super().__init__(pretrained=model, tokenizer=tokenizer, max_length=known_positions(model.config))
        self.progress: Progress = silent
        self.phase = "score"
        self.branching = follows_branches(model)
        self._longest = longest_tree(model)
        self._owners: list[Hashable] = []

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[Scored]:
        # The next method gets token ids alone.
        self._owners = [(request.task_name, request.doc_id) for request in requests]
        try:
            return super().loglikelihood(requests, disable_tqdm=True)
        finally:
            self._owners = []

    def _loglikelihood_tokens(
        self, requests: list[Tokenized], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[Scored]:
        texts = [self._text(*request[1:]) for request in requests]
        # A text that cannot stand in a tree with others belongs to itself.
        owners = [owner if self._fits(text) else text for owner, text in zip(self._owners or texts, texts, strict=True)]
        groups: dict[Hashable, dict[Text, Scored | None]] = {}
        for owner, text in zip(owners, texts, strict=True):
            groups.setdefault(owner, {})[text] = None  # once each: equal answers must tie exactly
        trees = [plant(list(group)) for group in groups.values()]
        scored = log_likelihoods(self.model, trees, self.progress, self.phase)
        found = {
            owner: dict(zip(group, many, strict=True))
            for (owner, group), many in zip(groups.items(), scored, strict=True)
        }
        return [found[owner][text] for owner, text in zip(owners, texts, strict=True)]

    def _text(self, context: list[int], continuation: list[int]) -> Text:
        """What does not fit the model is cut off on the left, as HFLM does."""
        assert 0 < len(continuation) <= self.max_length
        return Text(tuple((context + continuation)[-(self.max_length + 1) :]), len(continuation))

    def _fits(self, text: Text) -> bool:
        """Whether it may stand in a tree with others."""
        return self.branching and (self._longest is None or len(text.tokens) <= self._longest)
