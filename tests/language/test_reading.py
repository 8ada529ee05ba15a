"""How a language model is read: what it keeps, where its logits come from, against plain transformers."""

from __future__ import annotations

import pytest
import torch
import transformers

from gradientless.language import backbone


@pytest.mark.parametrize("name", ["cache", "past_key_values", "cache_params"])
def test_what_is_kept_is_found_whatever_it_is_called(name):
    """The library has renamed the argument before."""
    stack = torch.nn.Identity()
    made: dict = {}
    exec(f"def forward(input_ids, {name}=None): ...", made)
    stack.forward = made["forward"]
    kept = transformers.DynamicCache()
    assert backbone.keeps_as(stack) == name
    assert backbone.kept_in({"input_ids": torch.zeros(1, 1), "kept": kept}) is kept
    stack.forward = lambda input_ids, **more: None
    assert backbone.keeps_as(stack) is None and backbone.kept_in({"input_ids": torch.zeros(1, 1)}) is None
