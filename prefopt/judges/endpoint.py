"""A judge that is a language model behind an endpoint of yours that speaks OpenAI's protocol.

It compares two answers at a time, in both orders, since such judges favour the first or the second place. An answer's
score is the share of its comparisons that it wins; where the two orders disagree, or the model says so, it is a tie,
which counts one half.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from typing import Any, NoReturn

from prefopt.errors import UserError

KEY, HOST = "PREFOPT_JUDGE_KEY", "PREFOPT_JUDGE_HOST"
CRITERION = "Which answer is more helpful, correct and clear?"
QUESTION = """\
{criterion}

[Conversation]
{prompt}

[Answer A]
{first}

[Answer B]
{second}

Reply with one letter alone: A, B, or T for a tie."""
_TIE, _LETTER = re.compile(r"\btied?\b", re.IGNORECASE), re.compile(r"\b[ABT]\b")
_PASSING = (408, 409, 425, 429, 500, 502, 503, 504)
_VALUE = {"A": 1.0, "B": 0.0, "T": 0.5}


class EndpointJudge:
    """`endpoint: http://host/v1`, `model: NAME`.

    The key is that of the environment variable `PREFOPT_JUDGE_KEY`, and is sent only where `PREFOPT_JUDGE_HOST` names
    the endpoint's host and port: a recipe alone never sends a secret to a host of its choice. Redirects are refused.
    `prices`: dollars for a million tokens, `[in, out]`, for the summary. Every call is tried `retries` times more,
    after waits that double.
    """

    def __init__(
        self,
        endpoint: Any,
        *,
        model: str,
        criterion: str = CRITERION,
        workers: int = 8,
        retries: int = 5,
        seconds: float = 120,
        max_tokens: int = 16,
        prices: Sequence[float] | None = None,
        wait: float = 1.0,
    ) -> None:
        self._url = f"{str(endpoint).rstrip('/')}/chat/completions"
        if not self._url.startswith(("http://", "https://")):
            raise UserError(f"procedure.judge.endpoint: `{endpoint}` is no address. Write http://... or https://...")
        self._model, self._criterion, self._key = model, criterion, _key_for(self._url)
        self._opener = urllib.request.build_opener(_NoRedirects)
        self._workers, self._retries, self._seconds, self._wait = workers, retries, seconds, wait
        self._max_tokens, self._prices = max_tokens, prices
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(("calls", "retries", "unclear", "in", "out"), 0)

    @property
    def summary(self) -> str:
        """Calls, tokens and, with prices, dollars."""
        count = self._counts
        line = f"{count['calls']:,} calls ({count['retries']:,} again), {count['in']:,} tokens in, {count['out']:,} out"
        if count["unclear"]:
            line += f", {count['unclear']:,} replies without a verdict"
        if self._prices:
            dollars = (count["in"] * self._prices[0] + count["out"] * self._prices[1]) / 1e6
            line += f", {dollars:.4f} dollars"
        return line

    def scores(self, prompt: Any, answers: Sequence[str]) -> list[float]:
        pairs = list(combinations(range(len(answers)), 2))
        orders = [order for first, second in pairs for order in ((first, second), (second, first))]
        with ThreadPoolExecutor(self._workers) as pool:
            verdicts = list(pool.map(lambda order: self._compare(prompt, answers[order[0]], answers[order[1]]), orders))
        wins = [0.0] * len(answers)
        for number, (first, second) in enumerate(pairs):
            forth, back = verdicts[2 * number], 1 - verdicts[2 * number + 1]
            value = forth if forth == back else 0.5
            wins[first] += value
            wins[second] += 1 - value
        return [win / max(1, len(answers) - 1) for win in wins]

    def _compare(self, prompt: Any, first: str, second: str) -> float:
        """1 where the first answer wins, 0 where the second does, one half for a tie or an unclear reply."""
        said = (
            prompt
            if isinstance(prompt, str)
            else "\n".join(f"{turn['role']}: {turn.get('content') or ''}" for turn in prompt)
        )
        question = QUESTION.format(criterion=self._criterion, prompt=said, first=first, second=second)
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": self._max_tokens,
        }
        reply = self._post(json.dumps(body).encode())
        try:
            text = str(reply["choices"][0]["message"]["content"])
        except (LookupError, TypeError):
            raise UserError(f"judge {self._url}: answered {str(reply)[:200]}, not a chat completion") from None
        verdict = _verdict(text)
        usage = reply.get("usage") or {}
        with self._lock:
            self._counts["in"] += int(usage.get("prompt_tokens") or 0)
            self._counts["out"] += int(usage.get("completion_tokens") or 0)
            self._counts["unclear"] += verdict is None
        return 0.5 if verdict is None else _VALUE[verdict]

    def _post(self, body: bytes) -> Any:
        headers = {
            "Content-Type": "application/json",
            **({"Authorization": f"Bearer {self._key}"} if self._key else {}),
        }
        for attempt in range(self._retries + 1):
            with self._lock:
                self._counts["calls"] += 1
                self._counts["retries"] += attempt > 0
            try:
                request = urllib.request.Request(self._url, body, headers)
                with self._opener.open(request, timeout=self._seconds) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                reason = f"status {error.code}"
                if error.code not in _PASSING:
                    raise UserError(f"judge {self._url}: refuses with {reason}: {error.read()[:200]!r}") from None
            except (OSError, ValueError, http.client.HTTPException) as error:
                reason = str(error)
            time.sleep(self._wait * 2**attempt if attempt < self._retries else 0)
        raise UserError(f"judge {self._url}: no answer after {self._retries + 1} calls, the last one: {reason}")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would take the key and the answers to a host that nobody named."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> NoReturn:
        raise UserError(f"judge {req.full_url}: redirects to {newurl}. Write the address that answers itself")


def _key_for(url: str) -> str | None:
    """The key for an address, None without one. Raises `UserError` for a key whose host is another, or not named."""
    key, host = os.environ.get(KEY), urllib.parse.urlsplit(url).netloc
    if key and os.environ.get(HOST) != host:
        raise UserError(
            f"procedure.judge.endpoint: a recipe alone sends no key. To send {KEY} to {host}, set {HOST}={host}; "
            f"to send none, unset {KEY}"
        )
    return key or None


def _verdict(text: str) -> str | None:
    """`A`, `B` or `T`; None for a reply that names none of them, or several."""
    if _TIE.search(text):
        return "T"
    letters = set(_LETTER.findall(text))
    return letters.pop() if len(letters) == 1 else None
