"""A small social world: an agent sells to a scripted partner over six turns, and two of them decide the sale.

The partner opens and answers. In turn `KEY` it shows a mood, and in the next it gives a reason; each wants its own act
of the agent, and the sale is made if and only if both are right. What the agent says in the four other turns is small
talk, which the partner answers whatever it was.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt.generation import generate

TURNS, KEY = 6, 2
DECIDING = (KEY, KEY + 1)
ACTS = {"angry": "apologise", "curious": "explain", "rushed": "summarise", "shy": "encourage"}
ANSWERS = {"price": "discount", "colour": "samples", "safety": "certificate", "delivery": "courier"}
TOPICS = "weather football music garden traffic holidays cinema cooking".split()
TALK = "indeed lovely quite maybe certainly often rather pleasant today always really nice".split()
SKILL = 0.6  # how often the expert that the agent learns from takes the right act

Message = dict[str, str]


@dataclass
class Session:
    """A conversation under way. `mood`, `reason` and the partner's topics are drawn before it begins.

    `cut_off`: a turn of the agent did not end by itself, so data of this conversation would say an end that was none.
    """

    mood: str
    reason: str
    topics: list[str]
    messages: list[Message] = field(default_factory=list)
    cut_off: bool = False

    @classmethod
    def draw(cls, rng: random.Random) -> Session:
        """A partner, and what it opens with."""
        session = cls(rng.choice(list(ACTS)), rng.choice(list(ANSWERS)), rng.choices(TOPICS, k=TURNS))
        session.partner_speaks()
        return session

    @classmethod
    def of_task(cls, task: Mapping[str, Any]) -> Session:
        """The partner of a row of `task`, which has spoken first: an environment's episode."""
        return cls(task["mood"], task["reason"], list(task["topics"]), [dict(message) for message in task["prompt"]])

    @property
    def task(self) -> dict[str, Any]:
        """A finished conversation as a row: what the partner is and opens with, what followed, and what it earned."""
        partner = {"mood": self.mood, "reason": self.reason, "topics": self.topics}
        return {"prompt": self.messages[:1], "completion": self.messages[1:], "reward": self.reward, **partner}

    @property
    def turn(self) -> int:
        """The number of turns the agent has had."""
        return sum(message["role"] == "assistant" for message in self.messages)

    def partner_speaks(self) -> None:
        """The partner's next message, by its script."""
        lines = {KEY: f"i am {self.mood} now", KEY + 1: f"what about the {self.reason}"}
        text = lines.get(self.turn, f"what about {self.topics[self.turn]}")
        self.messages.append({"role": "user", "content": text})

    def agent_speaks(self, text: str) -> None:
        """The agent's turn, and the partner's answer where another turn follows; a ruined model may say any bytes."""
        heard = "".join(letter if letter.isprintable() else "?" for letter in text)
        self.messages.append({"role": "assistant", "content": heard or "-"})
        if self.turn < TURNS:
            self.partner_speaks()

    def wanted(self, turn: int) -> str | None:
        """The act that decides a turn; None where it is small talk."""
        return {KEY: ACTS[self.mood], KEY + 1: ANSWERS[self.reason]}.get(turn)

    def said(self, turn: int) -> str:
        """What the agent said in a turn."""
        return [message["content"] for message in self.messages if message["role"] == "assistant"][turn]

    def error(self) -> int | None:
        """The first turn with a wrong act; None for a sale."""
        acts = {turn: self.said(turn).split()[:1] if turn < self.turn else [] for turn in DECIDING}
        return next((turn for turn, act in acts.items() if act != [self.wanted(turn)]), None)

    @property
    def sold(self) -> bool:
        """Whether the conversation led to a sale."""
        return self.error() is None

    @property
    def reward(self) -> float:
        """1 for a sale, else 0."""
        return float(self.sold)

    def step(self, text: str) -> Message | None:
        """The agent's turn; what the partner answers, or None after the last one."""
        self.agent_speaks(text)
        return self.messages[-1] if self.messages[-1]["role"] == "user" else None

    def before(self, turn: int) -> Session:
        """The same partner and history, up to the agent's turn of this number."""
        return Session(self.mood, self.reason, self.topics, [dict(m) for m in self.messages[: 2 * turn + 1]])


def expert(rng: random.Random, session: Session) -> str:
    """A turn of the one the agent learns from: small talk, or an act that is right in `SKILL` of all cases."""
    talk = " ".join(rng.choices(TALK, k=rng.randint(2, 4)))
    wanted = session.wanted(session.turn)
    if wanted is None:
        return talk
    acts = list(ACTS.values()) if session.turn == KEY else list(ANSWERS.values())
    act = wanted if rng.random() < SKILL else rng.choice([other for other in acts if other != wanted])
    return f"{act} {talk}"


def expert_sessions(count: int, seed: int) -> list[Session]:
    """Whole conversations of the expert."""
    rng, sessions = random.Random(seed), []
    for _ in range(count):
        session = Session.draw(rng)
        while session.turn < TURNS:
            session.agent_speaks(expert(rng, session))
        sessions.append(session)
    return sessions


def play(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sessions: Sequence[Session], seed: int
) -> list[Session]:
    """The sessions played to their end by a model, all of them one turn at a time."""
    for step in range(TURNS):
        waiting = [session for session in sessions if session.turn == step]
        if waiting:
            prompts = [session.messages for session in waiting]
            said = generate(model, tokenizer, prompts, max_new_tokens=12, seed=seed * TURNS + step, batch_size=400)
            for session, answer in zip(waiting, said, strict=True):
                session.agent_speaks(answer.text.strip())
                session.cut_off |= not answer.finished
    return list(sessions)


def partners(count: int, seed: int) -> list[Session]:
    """Conversations that have not begun but for the partner's first words."""
    rng = random.Random(seed)
    return [Session.draw(rng) for _ in range(count)]


def session_pairs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int, seed: int, tries: int = 5
) -> list[dict[str, Any]]:
    """Pairs of whole conversations: a failure, and a sale that goes on from before its first wrong turn.

    The first of `tries` continuations that ends in a sale is taken, failures without one are left out, as are
    conversations with a turn that was cut off, and `start_message` and `end_message` bound the turns that decided it.
    At most `count` pairs.
    """
    failures = [
        session for session in play(model, tokenizer, partners(2 * count, seed), seed) if session.error() is not None
    ]
    again = [session.before(session.error() or 0) for session in failures for _ in range(tries)]
    played = play(model, tokenizer, again, seed + 1)
    rows = []
    for place, lost in enumerate(failures):
        branches = played[place * tries : (place + 1) * tries]
        sales = [branch for branch in branches if branch.sold and not branch.cut_off]
        if sales and not lost.cut_off and sales[0].said(lost.error() or 0) != lost.said(lost.error() or 0):
            bounds = {"start_message": 2 * (lost.error() or 0) + 1, "end_message": 2 * (KEY + 1) + 1}
            rows.append({"chosen": sales[0].messages, "rejected": lost.messages, **bounds})
    return rows[:count]
