"""A trainer whose pushes to the Hub never touch its training."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from prefopt.config import PreferenceConfig
from prefopt.console import say
from prefopt.hub.described import card_so_far, write_report
from prefopt.hub.files import (
    HELD,
    LAST,
    RECIPE_FILE,
    Files,
    checkpoint_files,
    folder_files,
    hold,
    holds_weights,
    let_go,
    model_files,
    report_files,
)
from prefopt.hub.pushes import Push, Pushes, pushes_of, wait_for_pushes
from prefopt.hub.sending import Destination, Sent, why
from prefopt.report.card import CARD_FILE
from prefopt.report.results import METRICS_FILE


class HubTrainer(Trainer):
    """The stock trainer with other pushes: of sealed checkpoints, of listed files, in the background, with our card.

    Whatever the Hub does, training and its results are the same. `recipe` holds the plain values of the recipe that a
    run came from, where there is one.
    """

    args: PreferenceConfig  # narrower than in the base class
    recipe: Mapping[str, Any] | None = None

    @cached_property
    def pushes(self) -> Pushes:
        """The pushes of this run; only the main process asks for them."""
        strategy = HubStrategy(self.args.hub_strategy).value
        return pushes_of(self._folder, strategy, every=self.args.hub_always_push)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository ready in the background; the constructor, which calls this, waits for no network."""
        if self.is_world_process_zero():
            let_go(self._folder)
            self.pushes.submit(Push("the repository", self._destination(token, private)))

    def push_to_hub(  # type: ignore[override]
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Sent | Future[Sent | None] | None:
        """Save the model, write its card and send both; what was sent, or None and a line that says why not.

        Every rank takes part in the saving, and only the main one sends. Without `blocking` a future comes back.
        `kwargs` are those of `create_model_card`.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        sent = self.push_run(commit_message, self._destination(token, private, revision))
        return sent.result() if blocking else sent

    def push_run(
        self, commit_message: str = "End of training", destination: Destination | None = None
    ) -> Future[Sent | None]:
        """Send the run folder as it stands, in the background. Call it on the main process."""
        strategy = HubStrategy(self.args.hub_strategy).value
        destination = destination or self._destination()
        say(f"push: the model is being sent; should this be cut off: {destination.command(self._folder)}")
        return self.pushes.submit(
            Push("the model", destination, commit_message, lambda: folder_files(self._folder, strategy))
        )

    def push_checkpoint(self, step: int) -> None:
        """Send the sealed checkpoint of a step in the background, where the settings ask for it."""
        args = self.args
        if not args.push_to_hub or args.hub_strategy == HubStrategy.END or not self.is_world_process_zero():
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        held, destination = self._folder / f"{HELD}{step}", self._destination()
        try:
            found = self._files_of(step)
            files = hold(found, held) if found else {}
        except Exception as error:  # a full disk, say: the checkpoint itself is whole
            let_go(held.parent, held.name)
            say(f"push: step {step} is not on the Hub: {why(error, destination)}")
            return
        if files:
            message = f"Training in progress, step {step}"
            self.pushes.submit(Push(f"step {step}", destination, message, lambda: files, held))

    def create_model_card(self, language: Any = None, license: str | None = None, **kwargs: Any) -> None:  # type: ignore[override]
        """Write our card, with results and curves, from what the run knows. Only `license` cannot be known."""
        if self.is_world_process_zero():
            write_report(self, license)  # type: ignore[arg-type]

    def end(self) -> None:
        """As in the base class; then wait for the pushes, which need no other process."""
        super().end()
        wait_for_pushes()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: here the checkpoint is not sealed yet. `push_checkpoint` comes after the seal."""

    def _finish_current_push(self) -> None:
        # The end of training waits for nobody where more is to come: a recipe's run waits when all is done, and
        # on several processes the others would wait in their next exchange.
        if self.args.push_to_hub and self.recipe is None and self.args.world_size == 1:
            self.pushes.wait()

    def _files_of(self, step: int) -> Files:
        """What is sent of a checkpoint: its model with the run so far, and the checkpoint itself where asked for."""
        folder = self._folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        files = model_files(folder)
        # Weights in shards are no model; that comes at the end.
        files = {**files, **self._report_so_far(files)} if holds_weights(files) else {}
        if self.args.hub_strategy == HubStrategy.CHECKPOINT:
            files |= checkpoint_files(folder, LAST)
        elif self.args.hub_strategy == HubStrategy.ALL_CHECKPOINTS:
            files |= checkpoint_files(folder, folder.name)
        return files

    def _report_so_far(self, model: Files) -> Files:
        """What goes with a model that is still training. Results and curves are those of a finished run."""
        report = report_files(self._folder)
        files = {name: report[name] for name in (RECIPE_FILE, METRICS_FILE) if name in report}
        if METRICS_FILE in files:
            files[METRICS_FILE] = (self._folder / METRICS_FILE).read_bytes()  # it grows while it is sent
        card = card_so_far(self, {*model, *files})  # type: ignore[arg-type]
        return {**files, CARD_FILE: card.encode()}

    @property
    def _folder(self) -> Path:
        return Path(str(self.args.output_dir))

    def _destination(
        self, token: str | None = None, private: bool | None = None, revision: str | None = None
    ) -> Destination:
        args = self.args
        return Destination(
            args.hub_model_id or self._folder.resolve().name,
            args.hub_private_repo if private is None else private,
            revision or args.hub_revision,
            token or args.hub_token,
        )
