"""Products of bf16 operands with float32 results, which only CUDA has: here they are made by rounding the operands."""

import pytest
import torch

from prefopt.scoring import Distribution, expected_rows, score_tokens, statistics_of
from prefopt.scoring.distribution import widens

M, H, V = 37, 16, 700


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    """A CPU that widens; operands must come rounded, or a product fails."""

    def product(left, right):
        assert left.dtype == right.dtype == torch.bfloat16
        return left.float() @ right.float()

    monkeypatch.setattr("prefopt.scoring.distribution.widens", lambda device: True)
    monkeypatch.setattr("prefopt.scoring.tiles.widened_product", product)
    monkeypatch.setattr("prefopt.scoring.tiles.CPU_TILE_BYTES", 2**14)


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    return torch.randn(M, H), torch.randn(V, H), torch.randint(0, V, (M,))


def exact(hidden, head, targets):
    """Log-probabilities and entropy of operands rounded to bf16, in float64."""
    logp = (hidden.bfloat16().double() @ head.bfloat16().double().T).log_softmax(-1)
    return logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(1)


def test_autocast_rounds_the_operands_and_not_the_logits(inputs):
    with autocast():
        found = score_tokens(*inputs, statistics=("logp", "entropy"))
    logp, entropy = exact(*inputs)
    assert found["logp"].dtype == torch.float32
    torch.testing.assert_close(found["logp"].double(), logp, atol=2e-5, rtol=0)
    torch.testing.assert_close(found["entropy"].double(), entropy, atol=2e-5, rtol=0)


def test_gradients_are_made_after_autocast_as_the_scores_were(inputs):
    hidden, head, targets = inputs
    ours = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
    with autocast():
        logp = score_tokens(*ours, targets)["logp"]
    logp.sum().backward()  # the emulation fails here for operands in float32
    theirs = [hidden.clone().double().requires_grad_(), head.clone().double().requires_grad_()]
    exact(*theirs, targets)[0].sum().backward()
    for one, other in zip(ours, theirs, strict=True):
        assert one.grad.dtype == torch.float32
        assert (one.grad - other.grad).norm() < 0.01 * other.grad.norm()


def test_a_reference_from_outside_is_compared_in_the_same_way(inputs):
    hidden, head, targets = inputs
    outside = Distribution(hidden, head)
    assert not outside.narrow
    with autocast():
        inside = Distribution(hidden, head)
        found = statistics_of(inside, targets, ("logp", "forward_kl", "reverse_kl"), outside)
    assert inside.narrow
    assert found["forward_kl"].abs().max() == 0 and found["reverse_kl"].abs().max() == 0


def test_expected_rows_give_the_divergence_of_the_rounded_logits(inputs):
    hidden, head, targets = inputs
    near = hidden + 0.05 * torch.randn(M, H)
    with autocast():
        policy, reference = Distribution(near, head), Distribution(hidden, head)
        rows = expected_rows(reference, targets)
        found = statistics_of(policy, targets, ("logp", "forward_kl"), rows)["forward_kl"]
        whole = statistics_of(policy, targets, ("logp", "forward_kl"), reference)["forward_kl"]
        itself = statistics_of(reference, targets, ("logp", "forward_kl"), rows)["forward_kl"]
    torch.testing.assert_close(found, whole, atol=2e-4, rtol=1e-3)
    assert itself.abs().max() < 1e-5


@pytest.mark.parametrize(
    ("hidden", "head", "in_autocast", "narrow"),
    [
        (torch.float32, torch.float32, False, False),
        (torch.float32, torch.float32, True, True),
        (torch.bfloat16, torch.bfloat16, False, True),
        (torch.bfloat16, torch.float32, False, False),
        (torch.bfloat16, torch.float32, True, True),
        (torch.float64, torch.float64, True, False),
    ],
)
def test_operands_are_rounded_where_they_come_so_or_autocast_asks(hidden, head, in_autocast, narrow):
    with torch.autocast("cpu", torch.bfloat16, enabled=in_autocast):
        assert Distribution(torch.zeros(2, 4, dtype=hidden), torch.zeros(3, 4, dtype=head)).narrow == narrow


def test_a_device_without_such_products_keeps_float32():
    assert not widens(torch.device("cpu"))
    assert widens(torch.device("cuda")) == hasattr(torch.ops.aten.mm, "dtype")
