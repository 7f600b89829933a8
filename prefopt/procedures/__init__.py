"""Procedures: plans of stages, and the runner that carries them out."""

from prefopt.procedures import online, single, small_world, social_world, spin, stepwise
from prefopt.procedures.runner import run_plan
from prefopt.procedures.stage import MakeStage, Stage, TrainStage, make_plan, procedures

__all__ = [
    "MakeStage",
    "Stage",
    "TrainStage",
    "make_plan",
    "online",
    "procedures",
    "run_plan",
    "single",
    "small_world",
    "social_world",
    "spin",
    "stepwise",
]
