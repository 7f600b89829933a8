"""Fixtures every test may use. Nothing here reaches the network."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", ""))

if "PREFOPT_STORE" not in os.environ:
    # Not the user's own; the processes that tests start share this one.
    os.environ["PREFOPT_STORE"] = tempfile.mkdtemp(prefix="prefopt-store-")
    atexit.register(shutil.rmtree, os.environ["PREFOPT_STORE"], ignore_errors=True)

import pytest

from tests import helpers


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data that lies beside a checkout; tests that want it skip where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the folder of real data is not here")
    return folder


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level BPE with bos, eos and pad, and a chat template that marks turns."""
    return helpers.make_tokenizer()


@pytest.fixture
def model(tokenizer):
    """A tiny random Llama in float32."""
    return helpers.make_model(vocab_size=len(tokenizer))
