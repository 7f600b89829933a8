"""The runs that are disturbed: a tiny model on disk, thirteen rows, three epochs of a few steps, and saves."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from tests import helpers
from tests.faults.launch import Launch, Server
from tests.faults.points import Spec
from tests.faults.prints import fingerprint

EPOCHS = 3

_SETTINGS: dict[str, Any] = {
    "loss": {"name": "dpo"},
    "learning_rate": 1.0e-2,
    "optim": "adamw_torch",
    "lr_scheduler_type": "cosine",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": EPOCHS,
    "save_steps": 1,
    "save_total_limit": 2,
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "activation_checkpointing": False,
}

_BATCH = "per_device_train_batch_size"

# All draw random numbers in every forward, so a resume that loses the random state ends elsewhere. The first has its
# reference in a store, and logs in the middle of epochs; the second has it beside the policy, and keeps the best model;
# the third estimates over the whole step before its first backward, has a loader in a process of its own, and saves at
# every other step; the reference of the fourth follows the policy.
CASES: dict[str, dict[str, Any]] = {
    "adapter": {
        "use_peft": True,
        "lora_r": 4,
        "lora_dropout": 0.1,
        "reference": {"source": "cached", "batch_size": 8},
        "logging_steps": 5,
        "eval_strategy": "steps",
        "eval_steps": 3,
    },
    "full": {
        "reference": {"source": "live"},
        "disable_dropout": False,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
    },
    "kto": {
        "loss": {"name": "kto"},
        "disable_dropout": False,
        "gradient_accumulation_steps": 3,
        "dataloader_num_workers": 1,
        "save_steps": 2,
        "logging_steps": 3,
    },
    "moving": {
        "loss": {"name": "tdpo2"},
        "use_peft": True,
        "lora_r": 4,
        "lora_dropout": 0.1,
        "reference": {"sync_steps": 3, "mixup_alpha": 0.6},
    },
}


@dataclass(frozen=True)
class Whole:
    """A run that nobody disturbed."""

    folder: Path
    prints: dict[str, str]
    begin: float  # seconds from its start to the first step
    seconds: float  # from there to its exit
    steps: dict[int, float]  # seconds from there to the end of each step


class Bench:
    """A folder with a model, rows and recipes, and the server that trains them."""

    def __init__(self, folder: Path, server: Server) -> None:
        self.folder = folder
        self.server = server
        tokenizer = helpers.make_tokenizer()
        model = helpers.make_model(vocab_size=len(tokenizer), attention_dropout=0.1)
        for part in (model, tokenizer):
            part.save_pretrained(folder / "model")
        for name, rows in (("train", helpers.text_pairs(13)), ("test", helpers.text_pairs(5, seed=5))):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self._wholes: dict[tuple[Any, ...], Whole] = {}
        self._listed: dict[tuple[Any, ...], list[tuple[str, bool]]] = {}

    def command(self, case: str, run: Path, ranks: int = 1, **settings: Any) -> list[str]:
        """The arguments that train a case; on two ranks each takes half of the rows of a micro-step."""
        recipe = self.folder / f"{case}-{ranks}.yaml"
        if not recipe.exists():
            files = {name: str(self.folder / f"{name}.jsonl") for name in ("train", "test")}
            own = {**_SETTINGS, **CASES[case], "model_name_or_path": str(self.folder / "model"), "data_files": files}
            shared = "gradient_accumulation_steps" if own[_BATCH] == 1 else _BATCH
            own[shared] //= ranks
            recipe.write_text(yaml.safe_dump(own))
        given = [f"--{name}={value}" for name, value in settings.items()]
        return ["train", str(recipe), "--output_dir", str(run), *given]

    def start(
        self,
        case: str,
        run: Path,
        ranks: int = 1,
        points: Spec | None = None,
        constants: dict[str, float] | None = None,
        **settings: Any,
    ) -> Launch:
        """Start a case, or go on with it, in the folder `run`: the same command each time. The store is beside it."""
        command = self.command(case, run, ranks, **settings)
        return self.server.start(command, run.parent, ranks=ranks, points=points, constants=constants)

    def finish(self, case: str, run: Path, ranks: int = 1, **more: Any) -> str:
        """Run a case to its end, undisturbed; what it said. Any other end is an assertion that fails."""
        launch = self.start(case, run, ranks, **more)
        statuses = launch.end()
        assert statuses == [0] * ranks, f"{statuses}: {launch.said[-3000:]}"
        return launch.said

    def interrupted(self, case: str, run: Path, points: Spec, ranks: int = 1, **more: Any) -> str:
        """Run a case until harm is done at its points; what it said. The other ranks are stopped as torchrun does."""
        launch = self.start(case, run, ranks, points, **more)
        launch.end()
        return launch.said

    def operations(self, case: str, points: Spec, ranks: int = 1, **more: Any) -> list[tuple[str, bool]]:
        """The names of the operations at these points, and whether a file was being written before each.

        The folder of the points is `run` or `store`, those of the run in which they are listed.
        """
        key = (case, points, ranks, *sorted(map(str, more.items())))
        if key not in self._listed:
            run = self.folder / f"listed-{len(self._listed)}" / "run"
            run.parent.mkdir()
            placed = replace(points, folder=str(run.parent / points.folder))
            launch = self.start(case, run, ranks, placed, **more)
            assert launch.end() == [0] * ranks, launch.said[-3000:]
            events = (event for event in launch.first.events if event["event"] == "operation")
            self._listed[key] = [(event["name"], event["cuts"]) for event in events]
        return self._listed[key]

    def differences(self, case: str, run: Path, ranks: int = 1, **settings: Any) -> list[str]:
        """What in a finished run is not as in the undisturbed one."""
        whole, own = self.whole(case, ranks, **settings).prints, fingerprint(run)
        return sorted(name for name in whole.keys() | own.keys() if whole.get(name) != own.get(name))

    def whole(self, case: str, ranks: int = 1, **settings: Any) -> Whole:
        """The undisturbed run of a case, made when it is asked for first."""
        key = (case, ranks, *sorted(settings.items()))
        if key not in self._wholes:
            self._wholes[key] = self._whole(case, ranks, settings)
        return self._wholes[key]

    def _whole(self, case: str, ranks: int, settings: dict[str, Any]) -> Whole:
        run = self.folder / "whole" / str(len(self._wholes)) / "run"
        run.parent.mkdir(parents=True)
        launch = self.start(case, run, ranks, **settings)
        assert launch.end() == [0] * ranks, launch.said[-3000:]
        times = {(event["event"], event["step"]): event["time"] for event in launch.first.events}
        begin = times["begin", 0]
        return Whole(
            run,
            fingerprint(run),
            begin - times["start", 0],
            times["exit", 0] - begin,
            {step: time - begin for (event, step), time in times.items() if event == "step"},
        )
