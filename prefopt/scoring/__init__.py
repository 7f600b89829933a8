"""The only code that sees the vocabulary: hidden states and heads in, per-token scores out."""

from prefopt.scoring.distribution import Distribution, ExpectedRows
from prefopt.scoring.expected import expected_rows
from prefopt.scoring.head import score_tokens, statistics_of
from prefopt.scoring.scores import TokenScores

__all__ = ["Distribution", "ExpectedRows", "TokenScores", "expected_rows", "score_tokens", "statistics_of"]
