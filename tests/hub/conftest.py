"""The stand-in for the Hub, and a process that takes it for the Hub."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import close_session, constants
from huggingface_hub.utils import _http

from prefopt.hub import sending
from prefopt.hub.pushes import wait_for_pushes
from tests.hub.runs import make_folder
from tests.hub.server import TOKEN, Hub


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Hub]:
    """An empty Hub at which everything in this process is logged in; nobody waits between two tries."""
    hub = Hub(tmp_path / "_hub")
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setattr(sending, "PAUSES", (0.0, 0.0))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # curves would take longer than the training
    close_session()
    yield hub
    wait_for_pushes()
    close_session()
    hub.close()


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    """A folder with a model, pairs and a recipe, made once."""
    return make_folder(tmp_path_factory.mktemp("home"))


@pytest.fixture
def here(home, tmp_path, monkeypatch) -> Path:
    """A working folder with the model, the pairs and the recipe in it."""
    folder = tmp_path / "work"
    folder.mkdir()
    for path in home.iterdir():
        (folder / path.name).symlink_to(path)
    monkeypatch.chdir(folder)
    return folder
