"""The tokenizers of the language wing's tests serve here, too."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: no test may reach for the network
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "language"))
