"""Divergences of two heads in one pass: against dense float64, in value, gradient, work done and edge cases."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from trl.kernels import ChunkedLogProbFunction
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from prefopt.errors import UserError
from prefopt.scoring import score_tokens, tiles
from tests.scoring.test_head import Allocations, assert_same, problem, use_tiles

EVERYTHING = ("logp", "ref_logp", "forward_kl", "reverse_kl", "entropy")
TRANSFORMS = [
    {},
    {"scale": 0.25},
    {"softcap": 1.5},
    {"scale": 3.0, "softcap": 2.0, "ref_scale": 0.5, "ref_softcap": 4.0},
    {"softcap": 2.0, "ref_softcap": math.inf},
    {"ref_scale": 2.0, "ref_softcap": 3.0},
]


def both(
    tokens: int = 7, width: int = 5, ref_width: int = 3, vocabulary: int = 11, **options: Any
) -> dict[str, Tensor]:
    """Random inputs for two models with heads of different width."""
    given = problem(tokens, width, vocabulary, **options)
    other = problem(tokens, ref_width, vocabulary, **{**options, "seed": 1})
    return {**given, **{f"ref_{name}": other[name].detach() for name in ("hidden", "head", "bias")}}


def logits(hidden: Tensor, head: Tensor, bias: Tensor, scale: float, softcap: float | None) -> Tensor:
    z = scale * (hidden @ head.t() + bias)
    return z if softcap is None or math.isinf(softcap) else softcap * torch.tanh(z / softcap)


def dense(given: dict[str, Tensor], transform: dict[str, Any]) -> dict[str, Tensor]:
    """The same statistics from whole `[M, V]` logits, differentiated by autograd."""
    scale, softcap = transform.get("scale", 1.0), transform.get("softcap")
    ref_scale, ref_softcap = transform.get("ref_scale", scale), transform.get("ref_softcap", softcap)
    log_p = logits(given["hidden"], given["head"], given["bias"], scale, softcap).log_softmax(-1)
    log_q = logits(given["ref_hidden"], given["ref_head"], given["ref_bias"], ref_scale, ref_softcap).log_softmax(-1)
    target = given["targets"].unsqueeze(1)
    return {
        "logp": log_p.gather(1, target).squeeze(1),
        "ref_logp": log_q.gather(1, target).squeeze(1),
        "forward_kl": (log_q.exp() * (log_q - log_p)).sum(1),
        "reverse_kl": (log_p.exp() * (log_p - log_q)).sum(1),
        "entropy": -(log_p.exp() * log_p).sum(1),
    }


def gradients(scores: dict[str, Tensor], given: dict[str, Tensor], upstream: dict[str, Tensor]) -> dict[str, Tensor]:
    loss = sum((scores[name] * weight).sum() for name, weight in upstream.items())
    names = ("hidden", "head", "bias")
    return dict(zip(names, torch.autograd.grad(loss, [given[name] for name in names]), strict=True))


def random_upstream(names: tuple[str, ...], tokens: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {name: torch.randn(tokens, generator=generator, dtype=torch.float64) for name in names}


def wide(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: value.detach().double().requires_grad_(value.requires_grad) if value.is_floating_point() else value
        for name, value in given.items()
    }


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("statistics", [("forward_kl",), ("reverse_kl",), EVERYTHING])
def test_gradcheck(monkeypatch: pytest.MonkeyPatch, statistics: tuple[str, ...], transform: dict[str, float]) -> None:
    use_tiles(monkeypatch, 2, 3)
    given = both(tokens=3, width=4, vocabulary=7)
    names = [name for name in statistics if name != "ref_logp"]

    def scores(hidden: Tensor, head: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        made = score_tokens(
            **{**given, "hidden": hidden, "head": head, "bias": bias}, statistics=statistics, **transform
        )
        return tuple(made[name] for name in names)

    assert torch.autograd.gradcheck(scores, (given["hidden"], given["head"], given["bias"]))


@pytest.mark.parametrize("tiles", [(1, 1), (1, 11), (7, 1), (2, 3), (3, 4), (5, 7), (7, 10), (7, 11), (64, 64)])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_every_tile_size_equals_dense(
    monkeypatch: pytest.MonkeyPatch, tiles: tuple[int, int], transform: dict[str, float]
) -> None:
    use_tiles(monkeypatch, *tiles)
    given = both()
    found, expected = score_tokens(**given, statistics=EVERYTHING, **transform), dense(given, transform)
    assert_same(found, expected, 1e-12)
    upstream = random_upstream(("logp", "forward_kl", "reverse_kl", "entropy"), 7)
    assert_same(gradients(found, given, upstream), gradients(expected, given, upstream), 1e-12)


@pytest.mark.parametrize("transform", [{}, {"softcap": 2.0}])
def test_tokens_that_need_different_tiles_each_get_their_gradient(transform: dict[str, float]) -> None:
    """Without a KL gradient (TDPO2's chosen), equal ones (TDPO1), neither, both: side by side in one backward."""
    given = both(tokens=8)
    grad_logp = torch.tensor([1.0, -2.0, 0.0, 0.5, 0.0, 3.0, 0.0, 1.0], dtype=torch.float64)
    grad_kl = torch.tensor([0.0, -2.0, 0.0, 0.25, 2.0, 3.0, 0.0, 0.0], dtype=torch.float64)
    upstream = {"logp": grad_logp, "forward_kl": grad_kl}
    found, expected = score_tokens(**given, statistics=EVERYTHING, **transform), dense(given, transform)
    assert_same(gradients(found, given, upstream), gradients(expected, given, upstream), 1e-12)


def products(upstream: dict[str, Tensor], **transform: float) -> int:
    """Multiply-adds of all matrix products of a backward pass, over those of one product with the head."""
    given = both(tokens=8, width=5, ref_width=5)
    names = tuple({"logp": None, **upstream})
    scores = score_tokens(**given, statistics=("ref_logp", *names), **transform)
    with Allocations() as seen:
        gradients(scores, given, upstream)
    assert seen.flops % (8 * 5 * 11) in (0, 4 * 5 * 11)
    return seen.flops / (8 * 5 * 11)


def test_tiles_that_do_not_matter_are_not_made() -> None:
    some, none = torch.ones(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    half = torch.cat([none[:4], some[4:]])
    assert products({"logp": some, "forward_kl": 0.5 * some}) == 4  # policy, reference, two gradients
    assert products({"logp": some, "forward_kl": none}) == 3  # alpha 0: DPO
    assert products({"logp": some, "forward_kl": 0.5 * half}) == 3.5  # TDPO2: no KL gradient at chosen answers
    assert products({"logp": some, "forward_kl": some}) == 3  # TDPO1: no tile of the policy
    assert products({"logp": some, "forward_kl": some}, softcap=2.0) == 4  # the cap's slope needs it
    assert products({"logp": none, "forward_kl": none}) == 0
    assert products({"logp": some}) == 3  # no divergence in the graph


def test_logged_divergences_cost_nothing_in_the_backward_pass() -> None:
    given = both()
    scores = score_tokens(**given, statistics=EVERYTHING)
    alone = score_tokens(**{name: given[name] for name in ("hidden", "head", "bias", "targets")})
    upstream = random_upstream(("logp",), 7)
    assert_same(gradients(scores, given, upstream), gradients(alone, given, upstream), 0.0)


@pytest.mark.parametrize("transform", TRANSFORMS[:4])
def test_float32_close_to_float64(transform: dict[str, float]) -> None:
    given = both(tokens=40, width=32, ref_width=48, vocabulary=3001, dtype=torch.float32)
    found, expected = score_tokens(**given, statistics=EVERYTHING, **transform), dense(wide(given), transform)
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("size", [1.0, 30.0, 300.0])
def test_large_logits_that_are_close_keep_their_digits(size: float) -> None:
    """A policy a step away from its reference: the KL is small, the logits are not."""
    given = problem(tokens=20, width=32, vocabulary=2000, dtype=torch.float32)
    hidden, head = given["hidden"].detach(), given["head"].detach() * size / 32**0.5
    generator = torch.Generator().manual_seed(4)
    step = 0.05 / size * torch.randn(hidden.shape, generator=generator)
    found = score_tokens(
        hidden + step, head, given["targets"], ref_hidden=hidden, ref_head=head, statistics=("forward_kl", "reverse_kl")
    )
    z, r = (hidden + step).double() @ head.double().t(), hidden.double() @ head.double().t()
    log_p, log_q = z.log_softmax(-1), r.log_softmax(-1)
    for name, expected in (
        ("forward_kl", (log_q.exp() * (log_q - log_p)).sum(1)),
        ("reverse_kl", (log_p.exp() * (log_p - log_q)).sum(1)),
    ):
        # What is left is rounding of the products themselves.
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-3, atol=2e-8 * size)


def test_equal_models_differ_by_exactly_nothing() -> None:
    given = problem(tokens=50, width=16, vocabulary=999, dtype=torch.float32)
    reference = {f"ref_{name}": given[name] for name in ("hidden", "head", "bias")}
    scores = score_tokens(**given, **reference, statistics=EVERYTHING, scale=20.0)
    assert not scores["forward_kl"].any() and not scores["reverse_kl"].any()
    assert torch.equal(scores["logp"], scores["ref_logp"])


def test_underflow_in_the_reference_is_harmless() -> None:
    """Reference probabilities of e^-500 and less: 0 in float32, and 0 times their logarithm is not a number."""
    given = both(tokens=20, vocabulary=400, dtype=torch.float32)
    found = score_tokens(**given, ref_scale=100.0, statistics=EVERYTHING)
    expected = dense(wide(given), {"ref_scale": 100.0})
    assert found["ref_logp"].min() < -500
    torch.testing.assert_close(found["forward_kl"].double(), expected["forward_kl"], rtol=1e-5, atol=1e-3)
    upstream = {
        name: value.float() for name, value in random_upstream(("logp", "forward_kl", "reverse_kl"), 20).items()
    }
    for value in gradients(found, given, upstream).values():
        assert value.isfinite().all()


def test_entries_that_cannot_occur_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias of -inf in both heads, over whole tiles too (a padded vocabulary)."""
    use_tiles(monkeypatch, 3, 2)
    given = both()
    given["targets"] = given["targets"] % 7 + 4
    short = {name: value[4:] if name.endswith(("head", "bias")) else value for name, value in given.items()}
    expected = dense({**short, "targets": given["targets"] - 4}, {})
    padded = {name: value.detach().clone() for name, value in given.items() if name.endswith("bias")}
    for value in padded.values():
        value[:4] = -torch.inf
    found = score_tokens(**{**given, **padded}, statistics=EVERYTHING)
    assert_same(found, expected, 1e-12)
    upstream = random_upstream(("logp", "forward_kl", "reverse_kl", "entropy"), 7)
    loss = sum((found[name] * weight).sum() for name, weight in upstream.items())
    grad = torch.autograd.grad(loss, given["head"])[0]
    assert grad.isfinite().all() and not grad[:4].any() and grad[4:].any()


@pytest.mark.parametrize("statistics", [("forward_kl",), EVERYTHING])
def test_no_token_gives_zero_gradients(statistics: tuple[str, ...]) -> None:
    given = both(tokens=0)
    scores = score_tokens(**given, statistics=statistics)
    assert all(value.shape == (0,) for value in scores.values())
    sum(value.sum() for value in scores.values()).backward()
    for name in ("hidden", "head", "bias"):
        assert given[name].grad is not None and given[name].grad.shape == given[name].shape
        assert not given[name].grad.any()


def test_no_gradient_reaches_the_reference() -> None:
    given = both()
    frozen = [given[name].requires_grad_() for name in ("ref_hidden", "ref_head", "ref_bias")]
    scores = score_tokens(**given, statistics=EVERYTHING)
    assert not scores["ref_logp"].requires_grad
    sum(scores[name].sum() for name in ("logp", "forward_kl", "reverse_kl")).backward()
    assert all(tensor.grad is None for tensor in frozen)


@pytest.mark.parametrize("frozen", [("head",), ("head", "bias"), ("hidden",), ("bias",)])
def test_frozen_inputs_get_no_gradient(frozen: tuple[str, ...]) -> None:
    given = both()
    for name in frozen:
        given[name].requires_grad_(False)
    score_tokens(**given, statistics=EVERYTHING)["forward_kl"].sum().backward()
    for name in ("hidden", "head", "bias"):
        assert (given[name].grad is None) == (name in frozen)


def test_tied_weight_gets_both_gradients() -> None:
    weight, other = (torch.randn(11, 5, dtype=torch.float64, requires_grad=grad) for grad in (True, False))
    ids, targets = torch.tensor([1, 4, 4, 9]), torch.tensor([4, 4, 9, 0])
    reference = {"ref_hidden": other[ids], "ref_head": other}
    found = score_tokens(weight[ids], weight, targets, **reference, statistics=("forward_kl",))["forward_kl"]
    log_p, log_q = (weight[ids] @ weight.t()).log_softmax(-1), (other[ids] @ other.t()).log_softmax(-1)
    expected = (log_q.exp() * (log_q - log_p)).sum(1)
    found, expected = (torch.autograd.grad(value.sum(), weight)[0] for value in (found, expected))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_vocabularies_of_different_size_are_refused() -> None:
    given, other = problem(), problem(vocabulary=12)
    with pytest.raises(UserError, match="12 rows and that of the policy 11"):
        score_tokens(**given, ref_hidden=other["hidden"], ref_head=other["head"], statistics=("forward_kl",))


def test_agrees_with_the_two_kernels_of_trl() -> None:
    given = both(tokens=33, width=16, ref_width=24, vocabulary=1000, dtype=torch.float32)
    ours, theirs = ("hidden", "head", "bias"), ("ref_hidden", "ref_head", "ref_bias")
    logp, *_ = ChunkedLogProbFunction.apply(
        *(given[name] for name in ours), given["targets"], 1.0, 256, 2.0, 0.5, ("entropy",)
    )
    ref_logp, *_ = ChunkedLogProbFunction.apply(
        *(given[name] for name in theirs), given["targets"], 1.0, 256, 3.0, 2.0, ("entropy",)
    )
    kl = {
        name: ChunkedDivergenceFunction.apply(
            *(given[each] for each in ours), *(given[each] for each in theirs), beta, 1.0, 0.5, 2.0, 2.0, 3.0
        )[0]
        for name, beta in (("forward_kl", 0.0), ("reverse_kl", 1.0))
    }
    expected = {"logp": logp, "ref_logp": ref_logp, **kl}
    transform = {"scale": 0.5, "softcap": 2.0, "ref_scale": 2.0, "ref_softcap": 3.0}
    found = score_tokens(**given, statistics=tuple(expected), **transform)
    assert_same(found, expected, 1e-5)
    upstream = {
        name: value.float() for name, value in random_upstream(("logp", "forward_kl", "reverse_kl"), 33).items()
    }
    found_gradients = gradients(found, given, upstream)
    for name, value in gradients(expected, given, upstream).items():
        assert (found_gradients[name] - value).norm() <= 1e-5 * value.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_wide(dtype: torch.dtype) -> None:
    given = both(tokens=40, width=32, ref_width=32, vocabulary=9000, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = score_tokens(**given, statistics=EVERYTHING)
    for name, expected in dense(wide(given), {}).items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-5, atol=2e-5)
    found["forward_kl"].sum().backward()
    assert given["head"].grad.dtype == dtype and given["hidden"].grad.dtype == dtype


@pytest.mark.parametrize("vocabulary", [8192, 131072])
def test_memory_is_flat_in_the_vocabulary(vocabulary: int) -> None:
    given = both(tokens=512, width=16, ref_width=16, vocabulary=vocabulary, dtype=torch.float32)
    given = {**given, "head": given["head"].detach(), "bias": given["bias"].detach()}
    own = {tensor.untyped_storage().data_ptr() for tensor in given.values()}
    saved: list[int] = []
    with (
        Allocations() as seen,
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t),
    ):
        scores = score_tokens(**given, statistics=EVERYTHING, softcap=30.0)
        (scores["logp"] + 0.5 * scores["forward_kl"] + scores["reverse_kl"]).sum().backward()
    made = [size for pointer, size in seen.largest.items() if pointer not in own]
    assert max(made) <= tiles.CPU_TILE_BYTES
    assert sum(saved) <= sum(given[name].numel() for name in given) + 16 * 512
