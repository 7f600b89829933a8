"""Answers sampled from a model: in memory, or to disk in shards that outlive a kill."""

from prefopt.generation.prompts import Prompt, encode_prompts
from prefopt.generation.sampling import Generation, Sampling, generate
from prefopt.generation.shards import generate_to_disk, read_generations

__all__ = ["Generation", "Prompt", "Sampling", "encode_prompts", "generate", "generate_to_disk", "read_generations"]
