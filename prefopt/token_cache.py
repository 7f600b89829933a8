"""Token ids kept from one run to the next, beside the reference scores: a tokenizer is asked about a row once.

What is kept is a row's ids before any limit (see `prefopt.data.drafts`), found by the row's content. An entry belongs
to one tokenizer as a function, with its template and what else decides the ids; rows of any order and number share it.
Cutting, leaving out and counting are done anew in every run, so limits and reports owe nothing to the cache.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from datetime import date
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

import tokenizers
import transformers

from prefopt.config import PreferenceConfig
from prefopt.console import say
from prefopt.data import drafts, templates
from prefopt.data.prepare import Needs, Preparation
from prefopt.data.truncation import Ids
from prefopt.errors import UserError
from prefopt.ranks import first_on_machine
from prefopt.reference.hashing import hash_json
from prefopt.reference.implementation import sources_of
from prefopt.reference.store import Entry, Store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KIND = "tokens"
AUTO, NEVER = "auto", "never"

T = TypeVar("T")


def preparation(tokenizer: PreTrainedTokenizerBase, args: PreferenceConfig, needs: Needs) -> Preparation:
    """How a run with this objective prepares its rows, with the cache that its settings ask for."""
    return Preparation.for_objective(tokenizer, args, needs, say=say, open_cache=partial(open_cache, tokenizer, args))


def open_cache(
    tokenizer: PreTrainedTokenizerBase, args: PreferenceConfig, settings: drafts.DraftSettings
) -> TokenCache | None:
    """The entry of this tokenizer with these settings; None where nothing is to be kept, or no place can be had."""
    if args.token_cache == NEVER:
        return None
    folder = (args.reference or {}).get("store") if args.token_cache == AUTO else args.token_cache
    try:
        key = hash_json(identity(tokenizer, settings))
    except Exception as error:  # a tokenizer of the user's own, which cannot be saved
        say(f"token cache: not used, for {type(tokenizer).__name__} cannot be saved: {error}")
        return None
    about = {"name": tokenizer.name_or_path or None, "class": type(tokenizer).__qualname__}
    return TokenCache(lambda: Store(folder, tell=say).entry(key, about, KIND))


def identity(tokenizer: PreTrainedTokenizerBase, settings: drafts.DraftSettings) -> dict[str, Any]:
    """All that decides which ids a text or conversation becomes, as JSON values."""
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = {str(path.relative_to(folder)): _digest(path) for path in Path(folder).rglob("*") if path.is_file()}
    return {
        "files": files,
        "class": type(tokenizer).__qualname__,
        "sources": sources_of(type(tokenizer).__mro__),
        "vocabulary": len(tokenizer),
        "special_tokens": [tokenizer.bos_token_id, tokenizer.eos_token_id],
        "splits_special_tokens": tokenizer.split_special_tokens,
        "settings": [settings.prompt_boundary, dict(settings.chat_template_kwargs), settings.targets],
        # A template may write the date.
        "date": date.today().isoformat() if "strftime_now" in str(tokenizer.chat_template) else None,
        "code": [_digest(Path(str(module.__file__))) for module in (drafts, templates)],
        "versions": [tokenizers.__version__, transformers.__version__],
    }


class TokenCache:
    """The drafts of one tokenizer in the store; see `prefopt.data.drafting.DraftCache`.

    A store that cannot be used, or whose drafts are not believed, is said once and holds nothing from then on.
    """

    def __init__(self, open_entry: Callable[[], Entry]) -> None:
        self._entry: Entry | None = None
        self._entry = self._use(open_entry, None)

    def turn(self) -> AbstractContextManager[bool]:
        """A block that the first process of each machine runs before its others do; whether this process is first."""
        return first_on_machine()

    def missing(self, ids: Collection[bytes]) -> set[bytes]:
        """Those of the ids that are not kept."""
        return set(ids) if self._entry is None else self._use(partial(self._entry.missing, ids), set(ids))

    def read(self, ids: Collection[bytes]) -> Mapping[bytes, Ids]:
        """What is kept and whole."""
        return {} if self._entry is None else self._use(partial(self._entry.read, ids), {})

    def write(self, drafts: Mapping[bytes, Ids]) -> bool:
        """Keep drafts; False where they cannot be kept."""
        if self._entry is not None:
            self._use(partial(self._entry.write, drafts), None)
        return self._entry is not None

    def distrust(self) -> None:
        """Take no draft from it any more."""
        place = self._entry and self._entry.path
        say(f"token cache: {place} has other ids than this tokenizer gives, and is not used. Delete it.")
        self._entry = None

    def _use(self, work: Callable[[], T], instead: T) -> T:
        try:
            return work()
        except UserError as error:
            say(f"token cache: not used from here on: {error}")
            self._entry = None
            return instead


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
