"""The tiled head against dense float64, in value, gradient, memory and edge cases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trl.kernels import ChunkedLogProbFunction

from prefopt.scoring import score_tokens, tiles

TRANSFORMS = [
    {},
    {"scale": 0.0625},
    {"softcap": 1.5},
    {"scale": 3.0, "softcap": 2.0},
]


def problem(
    tokens: int = 7, width: int = 5, vocabulary: int = 11, dtype: torch.dtype = torch.float64, seed: int = 0
) -> dict[str, Tensor]:
    """Random hidden states, head, bias (all with gradient) and targets that touch both ends of the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    targets[:2] = torch.tensor([0, vocabulary - 1])[: min(tokens, 2)]
    shapes = {"hidden": (tokens, width), "head": (vocabulary, width), "bias": (vocabulary,)}
    made = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for name, shape in shapes.items()
    }
    return {**made, "targets": targets}


def dense(
    hidden: Tensor, head: Tensor, targets: Tensor, bias: Tensor | None = None, scale: float = 1.0, softcap: Any = None
) -> dict[str, Tensor]:
    """The same statistics from whole `[M, V]` logits, differentiated by autograd."""
    z = hidden @ head.t() if bias is None else hidden @ head.t() + bias
    z = z * scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    log_p = z.log_softmax(-1)
    return {
        "logp": log_p.gather(1, targets.unsqueeze(1)).squeeze(1),
        "entropy": torch.distributions.Categorical(logits=z).entropy(),
    }


def gradients(scores: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of an uneven sum of all statistics."""
    loss = sum((i + 1) * (value * torch.arange(1, len(value) + 1)).sum() for i, value in enumerate(scores.values()))
    names = [name for name in ("hidden", "head", "bias") if name in inputs]
    return dict(zip(names, torch.autograd.grad(loss, [inputs[name] for name in names]), strict=True))


def use_tiles(monkeypatch: pytest.MonkeyPatch, rows: int, columns: int) -> None:
    monkeypatch.setattr(tiles, "tile_shape", lambda *_: (rows, columns))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("statistics", [("logp",), ("entropy",), ("logp", "entropy")])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_gradcheck(
    monkeypatch: pytest.MonkeyPatch, statistics: tuple[str, ...], transform: dict[str, float], with_bias: bool
) -> None:
    use_tiles(monkeypatch, 2, 3)
    given = problem(tokens=3, width=4, vocabulary=7)
    bias = given["bias"] if with_bias else None

    def scores(hidden: Tensor, head: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        made = score_tokens(hidden, head, given["targets"], bias=bias, statistics=statistics, **transform)
        return tuple(made[name] for name in statistics)

    assert torch.autograd.gradcheck(scores, (given["hidden"], given["head"], bias))


@pytest.mark.parametrize("tiles", [(1, 1), (1, 11), (7, 1), (2, 3), (3, 4), (5, 7), (7, 10), (7, 11), (64, 64)])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_every_tile_size_equals_dense(
    monkeypatch: pytest.MonkeyPatch, tiles: tuple[int, int], transform: dict[str, float]
) -> None:
    use_tiles(monkeypatch, *tiles)
    given = problem()
    found = score_tokens(**given, statistics=("logp", "entropy"), **transform)
    expected = dense(**given, **transform)
    assert_same(found, expected, 1e-12)
    assert_same(gradients(found, given), gradients(expected, given), 1e-12)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_float32_close_to_float64(transform: dict[str, float]) -> None:
    given = problem(tokens=40, width=32, vocabulary=3001, dtype=torch.float32)
    wide = {n: v.detach().double().requires_grad_() if v.is_floating_point() else v for n, v in given.items()}
    found = score_tokens(**given, statistics=("logp", "entropy"), **transform)
    expected = dense(**wide, **transform)
    assert found["logp"].dtype == torch.float32
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-5)
    found_gradients, expected_gradients = gradients(found, given), gradients(expected, wide)
    for name, value in expected_gradients.items():
        assert (found_gradients[name].double() - value).norm() <= 1e-5 * value.norm()


def test_default_tiles_split_a_large_vocabulary() -> None:
    given = problem(tokens=1100, width=8, vocabulary=5003, dtype=torch.float32)
    found = score_tokens(given["hidden"], given["head"], given["targets"])["logp"]
    rows, columns = tiles.tile_shape(1100, 8, 5003, 4, on_cpu=True)
    assert rows < 1100 and columns < 5003
    expected = dense(given["hidden"].double(), given["head"].double(), given["targets"])["logp"]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


def test_agrees_with_trl() -> None:
    given = problem(tokens=33, width=16, vocabulary=1000, dtype=torch.float32)
    logp, entropy, *_ = ChunkedLogProbFunction.apply(
        given["hidden"], given["head"], given["bias"], given["targets"], 1.0, 256, 2.0, 0.5, ("entropy",)
    )
    found = score_tokens(**given, statistics=("logp", "entropy"), softcap=2.0, scale=0.5)
    theirs = {"logp": logp, "entropy": entropy}
    assert_same(found, theirs, 1e-5)
    found_gradients = gradients(found, given)
    for name, value in gradients(theirs, given).items():
        assert (found_gradients[name] - value).norm() <= 1e-5 * value.norm()


def test_tied_weight_gets_both_gradients() -> None:
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    ids, targets = torch.tensor([1, 4, 4, 9]), torch.tensor([4, 4, 9, 0])
    found = torch.autograd.grad(score_tokens(weight[ids], weight, targets)["logp"].sum(), weight)[0]
    expected = torch.autograd.grad(dense(weight[ids], weight, targets)["logp"].sum(), weight)[0]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("statistics", [("logp",), ("logp", "entropy")])
def test_no_token_gives_zero_gradients(statistics: tuple[str, ...]) -> None:
    given = problem(tokens=0)
    scores = score_tokens(**given, statistics=statistics)
    assert all(value.shape == (0,) for value in scores.values())
    sum(value.sum() for value in scores.values()).backward()
    for name in ("hidden", "head", "bias"):
        assert given[name].grad is not None and given[name].grad.shape == given[name].shape
        assert not given[name].grad.any()


@pytest.mark.parametrize("frozen", [("head",), ("head", "bias"), ("hidden",), ("bias",)])
def test_frozen_inputs_get_no_gradient(frozen: tuple[str, ...]) -> None:
    given = problem()
    for name in frozen:
        given[name].requires_grad_(False)
    score_tokens(**given)["logp"].sum().backward()
    for name in ("hidden", "head", "bias"):
        assert (given[name].grad is None) == (name in frozen)


def test_frozen_head_costs_one_product_less() -> None:
    def products(trainable: bool) -> int:
        given = problem(tokens=4, dtype=torch.float32)
        given["head"].requires_grad_(trainable)
        with Allocations() as seen:
            score_tokens(given["hidden"], given["head"], given["targets"])["logp"].sum().backward()
        return seen.calls.count("aten.mm.default")

    assert products(True) == 4 and products(False) == 3


def test_logged_entropy_costs_nothing_in_the_backward_pass() -> None:
    given = problem()

    def backward(statistics: tuple[str, ...]) -> tuple[Tensor, list[str]]:
        loss = score_tokens(**given, statistics=statistics)["logp"].sum()
        with Allocations() as seen:
            gradient = torch.autograd.grad(loss, given["hidden"])[0]
        return gradient, [call for call in seen.calls if call != "aten.detach.default"]

    alone, logged = backward(("logp",)), backward(("logp", "entropy"))
    assert torch.equal(logged[0], alone[0]) and logged[1] == alone[1]


def test_reference_has_its_own_head_and_no_gradient() -> None:
    given, other = problem(), problem(width=3, seed=1)
    scores = score_tokens(
        **given,
        ref_hidden=other["hidden"],
        ref_head=other["head"],
        ref_bias=other["bias"],
        statistics=("logp", "ref_logp"),
        softcap=2.0,
    )
    expected = dense(other["hidden"], other["head"], given["targets"], other["bias"], softcap=2.0)["logp"]
    torch.testing.assert_close(scores["ref_logp"], expected, rtol=1e-12, atol=1e-12)
    assert scores["logp"].requires_grad and not scores["ref_logp"].requires_grad


def test_reference_equal_to_the_policy_is_exact() -> None:
    given = problem(tokens=50, width=16, vocabulary=999, dtype=torch.float32)
    reference = {f"ref_{name}": given[name] for name in ("hidden", "head", "bias")}
    scores = score_tokens(**given, **reference, statistics=("logp", "ref_logp", "entropy"))
    torch.testing.assert_close(scores["logp"], scores["ref_logp"], rtol=0, atol=2e-6)
    alone = score_tokens(**given, **reference, statistics=("logp", "ref_logp"))
    assert torch.equal(alone["logp"], alone["ref_logp"])


def test_wrong_requests_are_refused() -> None:
    given = problem()
    with pytest.raises(ValueError, match="Did you mean `entropy`"):
        score_tokens(**given, statistics=("entropie",))
    for name in ("ref_logp", "forward_kl", "reverse_kl"):
        with pytest.raises(ValueError, match="ref_hidden"):
            score_tokens(**given, statistics=("logp", name))
    with pytest.raises(ValueError, match="ref_hidden"):
        score_tokens(**given, ref_hidden=given["hidden"], ref_head=given["head"])


def test_target_outside_the_vocabulary_is_nan() -> None:
    given = problem()
    given["targets"] = given["targets"].clone()
    given["targets"][3], given["targets"][4] = -100, 11
    logp = score_tokens(**given)["logp"]
    assert logp.isnan().nonzero().flatten().tolist() == [3, 4]


def test_impossible_entries_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head bias of -inf (a padded vocabulary) removes entries, whole tiles of them too."""
    use_tiles(monkeypatch, 3, 4)
    given = problem()
    given["targets"] = given["targets"] % 4
    bias = given["bias"].detach().clone()
    bias[4:] = -torch.inf
    found = score_tokens(given["hidden"], given["head"], given["targets"], bias=bias)["logp"]
    expected = dense(given["hidden"], given["head"][:4], given["targets"], given["bias"][:4])["logp"]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    grad = torch.autograd.grad(found.sum(), given["head"])[0]
    assert grad.isfinite().all() and not grad[4:].any()


def test_large_logits_stay_exact() -> None:
    given = problem(tokens=20, width=8, vocabulary=500, dtype=torch.float32)
    found = score_tokens(given["hidden"], given["head"], given["targets"], scale=100.0, statistics=("logp", "entropy"))
    expected = dense(given["hidden"].double(), given["head"].double(), given["targets"], scale=100.0)
    assert found["logp"].isfinite().all() and found["logp"].min() < -500
    torch.testing.assert_close(found["logp"].double(), expected["logp"], rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(found["entropy"].double(), expected["entropy"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_wide(dtype: torch.dtype) -> None:
    """Vocabulary 32k: the sum over a sequence within 1e-4 of float64 on the same half-precision inputs."""
    given = problem(tokens=40, width=32, vocabulary=32768, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logp = score_tokens(**given)["logp"]
    wide = {name: value.detach().double() if value.is_floating_point() else value for name, value in given.items()}
    expected = dense(**wide)["logp"]
    assert logp.dtype == torch.float32
    assert (logp.double().sum() - expected.sum()).abs() <= 1e-4 * expected.sum().abs()
    torch.testing.assert_close(logp.double(), expected, rtol=1e-5, atol=1e-5)
    logp.sum().backward()
    assert given["head"].grad.dtype == dtype and given["hidden"].grad.dtype == dtype


def test_autocast_changes_nothing() -> None:
    given = problem(tokens=20, width=32, vocabulary=700, dtype=torch.float32)
    plain = score_tokens(**given)["logp"]
    expected = torch.autograd.grad(plain.sum(), given["head"])[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = score_tokens(**given)["logp"]
        found = torch.autograd.grad(inside.sum(), given["head"])[0]
    assert torch.equal(inside, plain) and torch.equal(found, expected)


def test_half_precision_gradient_is_rounded_once() -> None:
    """The weight's gradient sums over tokens in float32: many small terms must not stall in bf16."""
    given = problem(tokens=3000, width=4, vocabulary=16, dtype=torch.bfloat16)
    found = torch.autograd.grad(score_tokens(**given)["logp"].sum(), given["head"])[0]
    wide = {n: v.detach().double().requires_grad_() if v.is_floating_point() else v for n, v in given.items()}
    expected = torch.autograd.grad(dense(**wide)["logp"].sum(), wide["head"])[0]
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-2)


class Allocations(TorchDispatchMode):
    """Every operation's name, multiply-adds of matrix products, bytes of the largest storage any of them returned."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.flops = 0
        self.largest: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append(str(func))
        if str(func) == "aten.mm.default":
            self.flops += args[0].numel() * args[1].shape[1]
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.largest[leaf.untyped_storage().data_ptr()] = leaf.untyped_storage().nbytes()
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [8192, 131072])
def test_memory_is_flat_in_the_vocabulary(dtype: torch.dtype, vocabulary: int) -> None:
    given = problem(tokens=512, width=16, vocabulary=vocabulary, dtype=dtype)
    inputs = (given["hidden"], given["head"].detach(), given["targets"])
    own = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    saved: list[int] = []
    with (
        Allocations() as seen,
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t),
    ):
        score_tokens(*inputs, statistics=("logp", "entropy"), softcap=30.0)["logp"].sum().backward()
    made = [size for pointer, size in seen.largest.items() if pointer not in own]
    assert max(made) <= tiles.CPU_TILE_BYTES
    assert sorted(saved)[-1] == inputs[1].numel() and sum(saved) <= inputs[1].numel() + 16 * 512 + 8 * 512
