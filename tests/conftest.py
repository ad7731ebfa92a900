"""Settings of every test: eight simulated CPU devices, strict ranks, golden values, the real tokenizers if present."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import pytest

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    """Directory of golden values; its README defines every file."""
    return GOLDEN


@pytest.fixture(scope="session")
def tokenizers_dir() -> Path:
    """Directory with the real tokenizers `llama3`, `qwen3`, `gemma3`, `gpt_oss`; skips where it is absent."""
    path = os.environ.get("CFT_TOKENIZERS", "")
    if not path or not Path(path).is_dir():
        pytest.skip("CFT_TOKENIZERS does not name a directory with the real tokenizers")
    return Path(path)
