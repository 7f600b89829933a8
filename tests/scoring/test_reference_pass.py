"""Two models in turn: the reference's forward gives its distributions, the policy's compares itself with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate.utils.operations import convert_to_fp32
from torch import Tensor, nn
from torch.distributed.utils import _apply_to_tensors

from prefopt.errors import UserError
from prefopt.scoring import Distribution, expected_rows
from prefopt.scoring.model import DISTRIBUTION, enable_scoring
from tests.scoring.families import all_gradients, assert_gradients_close, backbone_inputs, batch, build, llama
from tests.scoring.test_adapters import lora

STATISTICS = ("logp", "ref_logp", "forward_kl", "reverse_kl")


def log_p(model: nn.Module, rows: dict[str, Tensor]) -> Tensor:
    """The model's own log-probabilities `[M, V]` at the scored tokens."""
    return model(**backbone_inputs(rows)).logits.flatten(0, 1)[rows["source"]].log_softmax(-1)


def own(policy: nn.Module, log_q: Tensor, rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same statistics from whole logits."""
    ours, target = log_p(policy, rows), rows["target"].unsqueeze(1)
    return {
        "logp": ours.gather(1, target).squeeze(1),
        "ref_logp": log_q.gather(1, target).squeeze(1),
        "forward_kl": (log_q.exp() * (log_q - ours)).sum(1),
        "reverse_kl": (ours.exp() * (ours - log_q)).sum(1),
    }


def distribution(model: nn.Module, rows: dict[str, Tensor]) -> Distribution:
    with torch.no_grad():
        return model(**rows, statistics=DISTRIBUTION)["distribution"]


def assert_compares(policy: nn.Module, given: Distribution, log_q: Tensor, rows: dict[str, Tensor]) -> None:
    found, expected = policy(**rows, statistics=STATISTICS, reference=given), own(policy, log_q, rows)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=2e-6)
    slopes = [all_gradients(policy, scores["logp"] + 0.5 * scores["forward_kl"]) for scores in (found, expected)]
    assert_gradients_close(*slopes)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "cohere", "granite", "phi3"])
def test_a_policy_compares_itself_with_another_model(family: str) -> None:
    """Each with its own scale or cap, head bias, tied or untied weights."""
    policy, reference = build(family), build(family)
    for model in (policy, reference):
        enable_scoring(model)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    rows = batch()
    assert_compares(policy, distribution(reference, rows), log_p(reference, rows).detach(), rows)


def test_a_reference_of_another_family_and_width() -> None:
    rows, policy, reference = batch(), llama(), build("gemma2", hidden_size=16, intermediate_size=32)
    enable_scoring(reference)
    given = distribution(reference, rows)
    assert given.hidden.shape == (9, 16) and given.softcap and not given.hidden.requires_grad
    assert_compares(policy, given, log_p(reference, rows).detach(), rows)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("changes", [{}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [4, 5, 6]}])
def test_an_adapter_switched_off_is_the_reference(changes: dict[str, Any], tied: bool) -> None:
    """Also where the adapter trains a head, or rows of it, of its own: the reference has the original one."""
    rows, base = batch(), llama(tie_word_embeddings=tied)
    log_q = log_p(base, rows).detach()
    adapted = lora(base, **changes)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "lora" not in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
        with adapted.disable_adapter():
            given = distribution(adapted, rows)
    assert_compares(adapted, given, log_q, rows)


def test_expected_rows_where_the_head_is_frozen() -> None:
    rows, base = batch(), llama()
    adapted = lora(base)
    with adapted.disable_adapter():
        given = distribution(adapted, rows)
    statistics = ("logp", "ref_logp", "forward_kl", "entropy")
    whole = adapted(**rows, statistics=statistics, reference=given)
    short = adapted(**rows, statistics=statistics, reference=expected_rows(given, rows["target"]))
    for name, value in whole.items():
        torch.testing.assert_close(short[name], value, rtol=1e-5, atol=2e-6)
    slopes = [all_gradients(adapted, scores["logp"] + scores["forward_kl"]) for scores in (short, whole)]
    assert_gradients_close(*slopes)
    with pytest.raises(UserError, match="head trains"):
        llama()(**rows, statistics=("forward_kl",), reference=expected_rows(given, rows["target"]))


def test_wrappers_leave_it_as_it_is() -> None:
    """FSDP and DDP cast tensors in arguments, accelerate those in results; bf16 hidden states stay bf16."""
    given = Distribution(torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(5, 3))
    assert _apply_to_tensors(lambda tensor: tensor.half(), {"reference": given})["reference"] is given
    assert convert_to_fp32({"distribution": given})["distribution"] is given
    assert given.hidden.dtype == torch.bfloat16


def test_the_head_of_a_model_in_one_piece_is_not_copied() -> None:
    model = llama()
    assert distribution(model, batch()).head is model.lm_head.weight
