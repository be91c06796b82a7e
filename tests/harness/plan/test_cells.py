"""What a cell looks at."""

import dataclasses

import pytest

from harness.data.protocols import Calibration, Training
from tests.harness.plan.test_keys import cell


@pytest.mark.parametrize(
    "text, training, windows",
    [
        ("gptq", None, 24),
        ("gptq-lora", Training(Calibration("c4-mini", 512, 64), 1), 24),
        ("gptq:distilled", Training(Calibration("c4-mini", 512, 64), 1), 24 + 64),
        ("reallm:distilled", Training(Calibration("c4-mini", 512, 100), 1), 24 + 72),  # at most three for each
        ("trellis:distilled", Training(Calibration("c4-mini", 256, 64), 1), 24),  # of another length
    ],
)
def test_statistics_of_distilled_methods_are_of_both_texts(text, training, windows):
    looking = dataclasses.replace(cell(text), training=training)
    assert looking.seen_tokens == 512 * windows
    assert dataclasses.replace(looking, calibration=None).seen_tokens == 0
