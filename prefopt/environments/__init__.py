"""Environments that a model acts in, one turn after the other, and that say what it has earned."""

from prefopt.environments.base import Environment, Episode
from prefopt.environments.opening import check_environment, environment_facts, open_environment

__all__ = ["Environment", "Episode", "check_environment", "environment_facts", "open_environment"]
