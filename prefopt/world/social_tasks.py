"""Tasks of the social world for a procedure with an environment: partners, and what an expert told each of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prefopt.data.segments import as_json_lines
from prefopt.errors import UserError
from prefopt.report.results import write_whole
from prefopt.world.social import expert_sessions

TASKS, TEST_TASKS = "tasks.jsonl", "test_tasks.jsonl"


@dataclass(frozen=True)
class TaskSettings:
    """How many tasks to explore and to test on, and the seed they are drawn with. `UserError` for sizes below 1."""

    tasks: int = 2000
    test_tasks: int = 400
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tasks", "test_tasks"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")


def make_tasks(folder: Path, settings: TaskSettings) -> None:
    """Write `tasks.jsonl` and `test_tasks.jsonl` to a folder: the expert's conversations, and what they earned."""
    for name, count, place in ((TASKS, settings.tasks, 0), (TEST_TASKS, settings.test_tasks, 1)):
        sessions = expert_sessions(count, 2 * settings.seed + place)
        write_whole(folder / name, as_json_lines([session.task for session in sessions]))
