"""What all tests share: the tests folder on the path (for `cases` and `reference`), one thread for torch."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--product", action="store_true", help="all optimizers x surfaces x evaluators x dtypes")
    parser.addoption("--damages", type=int, default=30, help="how often each file that is read back is damaged")
    parser.addoption(
        "--versions", choices=["allowed", "pinned", "newest", "oldest"], default="allowed", help="what was installed"
    )
