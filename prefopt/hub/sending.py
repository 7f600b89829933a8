"""One push: everything in a single commit, so that the repository is as it was or as it should be.

huggingface_hub does the work: large files go by their hash, and those the Hub already has are not sent again.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from httpx2 import TimeoutException
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import get_session

from prefopt import __version__
from prefopt.errors import UserError
from prefopt.hub.files import Content, Files, outdated, refuse_secrets
from prefopt.report.card import CARD_FILE, addressed

# huggingface_hub waits for ever where it is not told otherwise.
SILENCE = 120.0  # seconds without a byte before a connection is given up
PAUSES = (5.0, 30.0)  # seconds before another try of what failed on the Hub's side
_TRANSIENT = (408, 429)
_LONGEST_REASON = 240  # characters
_STATUS = {
    401: "the Hub refuses the token (401): it is missing, wrong or expired. Set HF_TOKEN or run `hf auth login`",
    403: "the token may not write to {} (403). Use one with the right to write there",
    404: "the Hub does not find {} or its branch (404), or hides it from this token",
}


@dataclass(frozen=True)
class Destination:
    """A repository of models: `NAME` in one's own namespace, or `USER/NAME`; the main branch unless `revision` is set.

    `private` counts only where the repository is made. Without a `token` the one of the environment or login is used.
    """

    repo: str
    private: bool | None = None
    revision: str | None = None
    token: str | None = field(default=None, repr=False)

    def command(self, folder: Path) -> str:
        """The command that sends a folder here."""
        words = ["prefopt", "push", str(folder), "--repo", self.repo]
        words += ["--private"] if self.private else []
        words += ["--revision", self.revision] if self.revision else []
        return shlex.join(words)


@dataclass(frozen=True)
class Sent:
    """What a push left on the Hub: the commit, and the SHA-256 of each file sent by its name."""

    repo: str
    oid: str
    commit_url: str
    files: dict[str, str]
    bytes: int
    removed: list[str]


def open_repository(destination: Destination) -> str:
    """Make the repository and the branch where they are not there yet; the repository's full name."""
    api = _api(destination)
    repo: str = api.create_repo(destination.repo, private=destination.private, exist_ok=True).repo_id
    if destination.revision and not destination.revision.startswith("refs/"):
        api.create_branch(repo, branch=destination.revision, exist_ok=True)
    return repo


def send(files: Mapping[str, Content], destination: Destination, message: str) -> Sent:
    """Send files in one commit, and take away what an earlier push left that would be read with them.

    What fails on the Hub's side is tried again a few times. Raises whatever huggingface_hub raises, and `UserError` for
    a file that holds a token.
    """
    refuse_secrets(files, destination.token)
    for pause in PAUSES:
        try:
            return _send(files, destination, message)
        except Exception as error:
            if not _may_pass(error):
                raise
            time.sleep(pause)
    return _send(files, destination, message)


def why(error: Exception, destination: Destination) -> str:
    """Why a push failed, in a line without a token in it."""
    text = _reason(error, destination.repo)
    for secret in (destination.token, get_token()):
        text = text.replace(secret, "(removed)") if secret else text
    return text


def _send(files: Mapping[str, Content], destination: Destination, message: str) -> Sent:
    api, revision = _api(destination), destination.revision
    repo = open_repository(destination)
    files = _addressed(files, repo)
    additions = [CommitOperationAdd(name, content) for name, content in files.items()]
    removed = outdated(api.list_repo_files(repo, revision=revision), files)
    once = {addition.upload_info.sha256: addition for addition in additions}
    if len(once) < len(additions):  # the same bytes under two names would travel twice
        api.preupload_lfs_files(repo, once.values(), revision=revision, free_memory=False)
    commit = api.create_commit(
        repo,
        [*additions, *(CommitOperationDelete(name, is_folder=False) for name in removed)],
        commit_message=message,
        revision=revision,
    )
    return Sent(
        repo,
        commit.oid,
        str(commit.commit_url),
        {addition.path_in_repo: addition.upload_info.sha256.hex() for addition in additions},
        sum(addition.upload_info.size for addition in additions),
        removed,
    )


def _api(destination: Destination) -> HfApi:
    client = get_session()
    if client.timeout.read is None:
        client.timeout = SILENCE
    return HfApi(token=destination.token, library_name="prefopt", library_version=__version__)


def _addressed(files: Mapping[str, Content], repo: str) -> Files:
    """The files, with the card under the repository's full name."""
    card = files.get(CARD_FILE)
    if card is None:
        return dict(files)
    text = card.decode() if isinstance(card, bytes) else card.read_text(encoding="utf-8")
    return {**files, CARD_FILE: addressed(text, repo).encode()}


def _may_pass(error: Exception) -> bool:
    """Whether another try may go better: the Hub or the way to it failed, not what was asked for."""
    error = _cause(error)
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500 or error.response.status_code in _TRANSIENT
    if isinstance(error, json.JSONDecodeError):  # a page of a proxy instead of an answer
        return True
    # A silence has been waited for several times already.
    return not isinstance(error, UserError | OfflineModeIsEnabled | TimeoutException | ValueError | OSError)


def _reason(error: Exception, repo: str) -> str:
    error = _cause(error)
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OfflineModeIsEnabled):
        return "offline mode is on (HF_HUB_OFFLINE)"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        known = _STATUS.get(status)
        return known.format(repo) if known else f"the Hub answered {status}: {_line(error.server_message or error)}"
    return f"{type(error).__name__}: {_line(error)}"


def _cause(error: Exception) -> Exception:
    """The error itself, or the one of an upload, which comes wrapped."""
    while isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _line(text: object) -> str:
    return " ".join(str(text).split())[:_LONGEST_REASON]
