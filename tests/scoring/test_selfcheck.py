"""The start-up check accepts rounding and nothing else."""

from __future__ import annotations

import pytest
import torch

from prefopt.errors import UserError
from prefopt.scoring.model import enable_scoring
from prefopt.scoring.selfcheck import SelfCheck, check_scores
from tests.scoring.families import batch, build, llama


def test_self_check_prints_difference_and_bound() -> None:
    result = check_scores(llama(), batch())
    assert isinstance(result, SelfCheck) and 0 <= result.max_difference <= result.bound < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "unknown"), [("granite", {"logits_scaling": 0}), ("cohere", {"logit_scale": 0}), ("hyperclovax", {})]
)
def test_self_check_catches_an_unknown_scale(
    monkeypatch: pytest.MonkeyPatch, family: str, unknown: dict[str, int], dtype: torch.dtype
) -> None:
    model = build(family, dtype)
    enable_scoring(model)
    check_scores(model, batch())
    monkeypatch.setattr("prefopt.scoring.model._SCALE_POWER_IN", {(family, name): p for name, p in unknown.items()})
    with pytest.raises(UserError, match=rf"{type(model).__name__}.*bound.*logit"):
        check_scores(model, batch())


def test_self_check_catches_an_unknown_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("gemma2")
    enable_scoring(model)
    monkeypatch.setattr("prefopt.scoring.model._SOFTCAPS", ())
    with pytest.raises(UserError, match=r"final_logit_softcapping=0\.3"):
        check_scores(model, batch())
    assert check_scores(model, batch(), tolerance=10.0).bound == 10.0


def test_self_check_refuses_nan_and_restores_modes() -> None:
    model = llama().train()
    model.model.layers[0].eval()
    check_scores(model, batch())
    assert model.training and not model.model.layers[0].training
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(UserError):
        check_scores(model, batch())


def test_self_check_needs_scored_tokens() -> None:
    rows = batch()
    rows["source"], rows["target"] = rows["source"][:0], rows["target"][:0]
    with pytest.raises(ValueError, match="no token"):
        check_scores(llama(), rows)
