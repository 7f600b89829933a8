"""A judge that is a program: one line of JSON in, one line of JSON out."""

from __future__ import annotations

import json
import math
import os
import subprocess
import threading
from collections.abc import Sequence
from typing import Any

from prefopt.errors import UserError

CONSENT = "PREFOPT_ALLOW_COMMANDS"


def permitted(command: Any) -> list[str]:
    """The words of a command. Raises `UserError` unless the environment lets a recipe's program run."""
    words = [command] if isinstance(command, str) else [str(word) for word in command]
    if os.environ.get(CONSENT) != "1":
        name = " ".join(words)
        raise UserError(f"procedure.judge.command: a recipe runs no program. To run {name}, set {CONSENT}=1")
    return words


class CommandJudge:
    """`command: [python, judge.py]`: started once, it reads `{"prompt": ..., "answers": [...]}` lines and writes
    `{"scores": [...]}` lines, in the same order, each at once. `seconds`: longest wait for a line.

    It is started only where the environment has `PREFOPT_ALLOW_COMMANDS=1`: a recipe alone never runs code.
    """

    summary = ""

    def __init__(self, command: Any, *, seconds: float = 300) -> None:
        words = permitted(command)
        self._name, self._seconds = " ".join(words), seconds
        try:
            self._process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
            )
        except OSError as error:
            raise UserError(f"procedure.judge.command: {self._name} does not start: {error}") from error

    def scores(self, prompt: Any, answers: Sequence[str]) -> list[float]:
        line = self._asked(json.dumps({"prompt": prompt, "answers": list(answers)}))
        try:
            scores = [float(score) for score in json.loads(line)["scores"]]
        except (ValueError, LookupError, TypeError):
            raise UserError(f'judge {self._name}: wrote {line[:200]!r}, not {{"scores": [...]}}') from None
        if len(scores) != len(answers) or not all(map(math.isfinite, scores)):
            raise UserError(f"judge {self._name}: wrote {scores} for {len(answers)} answers")
        return scores

    def _asked(self, line: str) -> str:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        # A line that does not come would be waited for without end.
        limit = threading.Timer(self._seconds, self._process.kill)
        limit.start()
        try:
            stdin.write(f"{line}\n")
            stdin.flush()
            answer = stdout.readline()
        except UnicodeDecodeError:
            raise UserError(f"judge {self._name}: wrote a line that is not UTF-8") from None
        except OSError:
            answer = ""
        finally:
            limit.cancel()
        if not answer:
            status = self._process.wait()
            raise UserError(
                f"judge {self._name}: ended with status {status}, or after {self._seconds:g} s without a line"
            )
        return answer

    def __del__(self) -> None:
        if hasattr(self, "_process") and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
