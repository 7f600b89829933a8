"""The only code that sees the vocabulary: hidden states and heads in, per-token scores out."""

from prefopt.scoring.head import score_tokens
from prefopt.scoring.scores import TokenScores

__all__ = ["TokenScores", "score_tokens"]
