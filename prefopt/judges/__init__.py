"""Judges of answers: a function of yours, a command, a reward model, an OpenAI-compatible endpoint, the small world."""

from prefopt.judges.base import Judge
from prefopt.judges.opening import check_judge, judge_facts, open_judge, refuse_unready

__all__ = ["Judge", "check_judge", "judge_facts", "open_judge", "refuse_unready"]
