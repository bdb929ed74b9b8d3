"""The ridge least squares of the refit, against an independent solution of the same problem."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from amprune.cut.refit.moments import Moments, Refit, solve
from amprune.errors import ReconstructionError

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Problem:
    """Tokens of the fit and held-out ones: what is given, and what is missing."""

    given: torch.Tensor
    missing: torch.Tensor
    held_given: torch.Tensor
    held_missing: torch.Tensor

    def moments(self, *, parts: int = 3, dtype: torch.dtype = torch.float64) -> Moments:
        inputs, outputs = self.given.shape[1], self.missing.shape[1]
        moments = Moments(inputs, outputs, CPU, dtype)
        for given, missing in zip(self.given.chunk(parts), self.missing.chunk(parts), strict=True):
            moments.add(given[None], missing[None], missing[None] + 1, held_out=False)
        moments.add(self.held_given, self.held_missing, self.held_missing + 1, held_out=True)
        return moments


def problem(
    *, tokens: int = 90, inputs: int = 12, outputs: int = 7, noise: float = 0.3, bias: bool = False, seed: int = 0
) -> Problem:
    """What is missing is a linear map of what is given, with noise; with a bias, the last input is one."""
    draw = np.random.default_rng(seed)
    given = draw.normal(size=(2 * tokens, inputs)) * draw.lognormal(size=inputs)
    if bias:
        given = np.concatenate([given, np.ones((2 * tokens, 1))], axis=1)
    missing = given @ draw.normal(size=(given.shape[1], outputs)) + noise * draw.normal(size=(2 * tokens, outputs))
    halves = (
        torch.tensor(values[part]) for part in (slice(tokens), slice(tokens, None)) for values in (given, missing)
    )
    return Problem(*halves)


def reference(found: Problem, strength: float, *, bias: bool) -> Any:
    """Least squares of the stacked system [H; sqrt(ridge) I] D = [R; 0], without a ridge on the bias."""
    given, missing = found.given.numpy(), found.missing.numpy()
    width = given.shape[1]
    diagonal = (given**2).sum(axis=0)
    ridge = np.full(width, strength * diagonal[: width - bias].mean())
    ridge[width - bias :] = 0
    stacked = np.concatenate([given, np.diag(np.sqrt(ridge))])
    target = np.concatenate([missing, np.zeros((width, missing.shape[1]))])
    return np.linalg.lstsq(stacked, target, rcond=None)[0]


def whole(refit: Refit) -> torch.Tensor:
    assert refit.change is not None
    return refit.change if refit.bias_change is None else torch.cat([refit.change, refit.bias_change[None]])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("noise", [0.01, 3.0, 30.0])
def test_the_change_is_that_of_the_stacked_system(noise: float, bias: bool) -> None:
    made = problem(noise=noise, bias=bias)
    refit = solve(made.moments(), bias=bias)
    assert refit.strength is not None
    assert (refit.bias_change is not None) == bias
    expected = reference(made, refit.strength, bias=bias)
    assert np.abs(whole(refit).numpy() - expected).max() < 1e-9 * np.abs(expected).max()
    assert refit.tokens == 90


@pytest.mark.parametrize("bias", [False, True])
def test_the_errors_are_those_of_the_change(bias: bool) -> None:
    made = problem(bias=bias)
    refit = solve(made.moments(), bias=bias)
    change = whole(refit)
    for given, missing, before, after in (
        (made.given, made.missing, refit.before, refit.after),
        (made.held_given, made.held_missing, refit.held_out_before, refit.held_out_after),
    ):
        target = float((missing + 1).square().sum())
        assert before == pytest.approx(float(missing.square().sum()) / target)
        assert after == pytest.approx(float((missing - given @ change).square().sum()) / target)
        assert after < before


def test_the_strength_is_better_than_its_neighbours_and_is_found_from_anywhere() -> None:
    made = problem(noise=8.0, tokens=30)
    refits = [solve(made.moments(), bias=False, strength=strength) for strength in (1e-5, 0.1, 100.0)]
    assert len({refit.strength for refit in refits}) == 1
    strength = refits[0].strength
    assert strength is not None

    def held_out(value: float) -> float:
        change = torch.tensor(reference(made, value, bias=False))
        return float((made.held_missing - made.held_given @ change).square().sum())

    assert held_out(strength) <= min(held_out(strength * 10**0.5), held_out(strength / 10**0.5))


def test_the_more_noise_the_stronger_the_ridge() -> None:
    strengths = [solve(problem(noise=noise, tokens=30).moments(), bias=False).strength for noise in (0.01, 8.0)]
    assert strengths[0] is not None
    assert strengths[1] is not None
    assert strengths[0] < strengths[1]


def test_an_enormous_ridge_holds_the_weights_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """It shrinks the change, and with it the weights to those that were kept, not to zero; the bias is free."""
    made, norms = problem(bias=True), []
    made = Problem(made.given, made.missing + 20, made.held_given, made.held_missing + 20)
    for strength in (1e-5, 1.0, 100.0, 1e9):
        monkeypatch.setattr("amprune.cut.refit.moments._STRENGTHS", (strength, 2 * strength))
        refit = solve(made.moments(), bias=True)
        assert refit.change is not None
        assert refit.bias_change is not None
        norms.append(float(refit.change.norm()))
    assert norms == sorted(norms, reverse=True)
    assert norms[-1] < 1e-6 * norms[0]
    assert refit.bias_change is not None
    assert torch.allclose(refit.bias_change, made.missing.mean(dim=0), atol=1e-6)


def test_where_held_out_tokens_disagree_nothing_changes() -> None:
    made = problem()
    refit = solve(Problem(made.given, made.missing, made.held_given, -made.held_missing).moments(), bias=False)
    assert (refit.change, refit.bias_change, refit.strength) == (None, None, None)
    assert refit.after == refit.before > 0
    assert refit.held_out_after == refit.held_out_before > 0


def test_where_nothing_is_missing_nothing_changes() -> None:
    made = problem()
    refit = solve(Problem(made.given, 0 * made.missing, made.held_given, 0 * made.held_missing).moments(), bias=False)
    assert refit.change is None
    assert refit.before == refit.after == refit.held_out_after == 0


def duplicated(values: torch.Tensor) -> torch.Tensor:
    return torch.cat([values, values[:, :4]], dim=1)


def unused(values: torch.Tensor) -> torch.Tensor:
    return torch.cat([values[:, :5], 0 * values[:, :1], values[:, 5:]], dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("tokens", "change"),
    [(90, duplicated), (90, unused), (6, None), (1, None), (90, lambda values: 1e-18 * values)],
    ids=["duplicate inputs", "an input that is zero", "fewer tokens than inputs", "one token", "tiny inputs"],
)
def test_singular_moments_give_finite_changes(tokens: int, change: Any, dtype: torch.dtype) -> None:
    made = problem(tokens=tokens, noise=0.0)
    if change is not None:
        made = Problem(change(made.given), made.missing, change(made.held_given), made.held_missing)
    refit = solve(made.moments(parts=1, dtype=dtype), bias=False)
    assert refit.held_out_after <= refit.held_out_before
    if refit.change is not None:
        assert torch.isfinite(refit.change).all()
    if change is unused:
        assert refit.change is not None
        assert not refit.change[5].any(), "an input that is never used keeps its weight"
    if change is duplicated:
        assert refit.change is not None
        assert (refit.change[:4] - refit.change[-4:]).norm() < 0.05 * refit.change.norm(), "they share the change"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("strength", [1e-5, 0.1])
def test_a_massive_input_beside_dependent_ones_is_no_error(strength: float, dtype: torch.dtype) -> None:
    """Its square drowns the others in float32 products, so that moments with a weak ridge are indefinite."""
    made = problem(inputs=40, tokens=400, noise=0.0)
    scales = torch.cat([torch.full((1,), 1e5), torch.full((39,), 1e-2)]).double()

    def massive(values: torch.Tensor) -> torch.Tensor:
        scaled = (values.abs() * scales).float()
        return torch.cat([scaled, scaled, scaled[:, :1] + scaled[:, 1:2]], dim=1)

    given, held = massive(made.given), massive(made.held_given)
    refit = solve(
        Problem(given, made.missing.float(), held, made.held_missing.float()).moments(dtype=dtype),
        bias=False,
        strength=strength,
    )
    assert refit.held_out_after <= refit.held_out_before
    assert refit.change is None or torch.isfinite(refit.change).all()


def test_inputs_that_are_all_zero_leave_the_bias_to_be_fitted() -> None:
    given = torch.tensor([[0.0, 0.0, 1.0]]).repeat(20, 1)
    missing = torch.full((20, 4), 2.5)
    refit = solve(Problem(given, missing, given, missing).moments(), bias=True)
    assert refit.bias_change is not None
    assert torch.allclose(refit.bias_change, torch.full((4,), 2.5, dtype=torch.float64), atol=1e-6)
    assert refit.change is not None
    assert not refit.change.any()


def test_float32_moments_come_close() -> None:
    made = problem()
    wide, narrow = (solve(made.moments(dtype=dtype), bias=False) for dtype in (torch.float64, torch.float32))
    assert wide.change is not None
    assert narrow.change is not None
    assert narrow.change.dtype == torch.float32
    assert (wide.change - narrow.change).norm() < 1e-4 * wide.change.norm()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["given", "missing", "held_missing"])
def test_values_that_are_not_finite_are_an_error(where: str, value: float) -> None:
    made = problem()
    getattr(made, where)[3, 2] = value
    with pytest.raises(ReconstructionError, match="gives activations that are not finite"):
        solve(made.moments(), bias=False)


def test_held_out_inputs_that_are_not_finite_change_nothing() -> None:
    made = problem()
    made.held_given[3, 2] = float("inf")
    assert solve(made.moments(), bias=False).change is None
