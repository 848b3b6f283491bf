"""The two-dimensional toy problem of CAGrad, Nash-MTL and Aligned-MTL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import torch

from detente.problems.base import AnalyticProblem

Scales = Literal["cagrad", "nash-mtl", "aligned-mtl"]
SCALES: dict[str, tuple[float, float]] = {
    "cagrad": (1.0, 1.0),
    "nash-mtl": (0.1, 1.0),
    "aligned-mtl": (0.5, 0.5),
}
"""The factors of the two losses in each paper's code."""

_LEAST = 5e-6  # under the logarithms


class Toy(AnalyticProblem):
    """Two tasks on the plane: two narrow valleys above the axis θ₂ = 0, two bowls in conflict below it.

    With h₁ = abs((-θ₁ - 7)/2 - tanh(-θ₂)) and h₂ = abs((-θ₁ + 3)/2 + tanh(-θ₂) + 2),

    - above, f_i = log(max(h_i, 5e-6)) + 6, faded in by c₁ = max(tanh(θ₂/2), 0);
    - below, g₁ = ((-θ₁ + 7)² + 0.1 (-θ₂ - 8)²)/10 - 20 and g₂ the same with (-θ₁ - 7)², faded in by
      c₂ = max(tanh(-θ₂/2), 0);
    - L_i = s_i (c₁ f_i + c₂ g_i), with the factors s of ``scales``.

    This is the problem as the public codes of Liu et al. 2021 (CAGrad), Navon et al. 2022 (Nash-MTL) and Senushkin et
    al. 2023 (Aligned-MTL) compute it. The appendix printed by Senushkin et al. differs: it swaps g₁ and g₂, and the
    sign of the tanh in h₂ is flipped. On the axis itself, where the second start lies, the gradient is a convention:
    here both fades keep the slope of the side they rise to, so that ∂L_i/∂θ₂ = s_i (f_i - g_i)/2. The codes clamp, and
    torch's clamp passed the gradient at its bound when they were published; from torch 2.14 on it is zero there, and
    that start would never move.

    **Optimum.** Below the axis, Σ w_i L_i = c₂ Σ w_i s_i g_i. With a_i = w_i s_i and m = (a₁ - a₂)/(a₁ + a₂) it is
    smallest at θ₁ = 7 m, and there it equals (a₁ + a₂) c₂(θ₂) (4.9 (1 - m²) - 20 + (θ₂ + 8)²/100). Its slope in θ₂
    has one zero below the axis, which lies between -9 and -8 and is found numerically. These points are the Pareto
    set: whatever lies above has both L_i ≥ -6.21 s_i, and the middle of the Pareto set has -15.1 s_i.

    Args:
        scales: factors of the two losses: ``cagrad`` (1, 1), ``nash-mtl`` (0.1, 1), ``aligned-mtl`` (0.5, 0.5).

    Raises:
        ValueError: ``scales`` is none of them.

    Example:
        >>> toy = Toy()
        >>> toy.losses(torch.tensor([[0.0, -8.0], [7.0, -8.0]], dtype=torch.float64))
        tensor([[-15.0899, -15.0899],
                [-19.9866,  -0.3997]], dtype=torch.float64)
        >>> toy.optimum([1.0, 1.0])
        tensor([ 0.0000, -8.3551], dtype=torch.float64)
    """

    dimension: ClassVar[int] = 2
    tasks: ClassVar[tuple[str, ...]] = ("first", "second")
    bounds: ClassVar[tuple[tuple[float, float], ...]] = ((-10.0, 10.0), (-10.0, 10.0))
    starts: ClassVar[tuple[tuple[float, ...], ...]] = (
        (-8.5, 7.5),
        (0.0, 0.0),
        (9.0, 9.0),
        (-7.5, -0.5),
        (9.0, -1.0),
    )

    def __init__(self, scales: Scales = "cagrad") -> None:
        if scales not in SCALES:
            raise ValueError(f"option scales is {scales!r}; choose one of {', '.join(map(repr, SCALES))}.")
        self.factors = SCALES[scales]

    def losses(self, theta: torch.Tensor) -> torch.Tensor:
        """[..., 2] points to [..., 2] losses.

        Raises:
            ValueError: the last axis of ``theta`` is not 2.
        """
        if theta.shape[-1:] != (2,):
            raise ValueError(f"theta has shape {tuple(theta.shape)}; its last axis must be 2.")
        x, y = theta[..., :1], theta[..., 1:]
        ends = theta.new_tensor([7.0, -7.0]) - x  # h₁ is bent around (-θ₁ - 7)/2, h₂ around (-θ₁ + 3)/2 + 2
        distance = (ends.flip(-1) / 2 + torch.tanh(y) * theta.new_tensor([1.0, -1.0])).abs()
        valleys = _at_least(distance, _LEAST).log() + 6
        bowls = (ends.square() + 0.1 * (y + 8).square()) / 10 - 20
        fade = torch.tanh(y / 2)
        return (_at_least(fade, 0) * valleys + _at_least(-fade, 0) * bowls) * theta.new_tensor(self.factors)

    @property
    def lower(self) -> torch.Tensor:
        """[2] float64, -20 s: the bowls end at -20 and their fade stays below 1; the valleys end above."""
        return -20.0 * torch.tensor(self.factors, dtype=torch.float64)

    def optimum(self, preference: Sequence[float]) -> torch.Tensor:
        """[2] float64, where w₁ L₁ + w₂ L₂ is smallest for w = ``preference`` (two numbers >= 0, not both 0).

        Raises:
            ValueError: there are not two, one is negative or not finite, or both are 0.
        """
        weights = np.asarray(preference, dtype=np.float64)
        if weights.shape != (2,) or not np.isfinite(weights).all() or weights.min() < 0 or weights.sum() == 0:
            raise ValueError(f"preference is {preference}; give two finite numbers >= 0, not both 0.")
        first, second = weights * self.factors
        return _valley_floor(np.array([(first - second) / (first + second)]))[0]

    def pareto_set(self, points: int) -> torch.Tensor:
        """[points, 2] float64, from the second task's optimum (θ₁ = -7) to the first's (θ₁ = 7), evenly in θ₁."""
        return _valley_floor(np.linspace(-1.0, 1.0, points))


def _at_least(values: torch.Tensor, bound: float) -> torch.Tensor:
    # Not clamp: which gradient that passes at its bound depends on torch's version.
    return torch.where(values >= bound, values, bound)


def _valley_floor(balance: np.ndarray) -> torch.Tensor:
    """[N] values of m in [-1, 1] to the minimisers [N, 2] (the class says how), by bisection of the slope in θ₂."""
    depth = 4.9 * (1 - balance**2) - 20
    low, high = np.full_like(balance, -9.0), np.full_like(balance, -8.0)  # the slope is < 0 at -9, > 0 at -8
    for _ in range(60):  # 2⁻⁶⁰ of the interval is below the spacing of float64
        middle = (low + high) / 2
        fade = np.tanh(-middle / 2)
        slope = 0.02 * (middle + 8) * fade - 0.5 / np.cosh(middle / 2) ** 2 * (
            depth + 0.01 * (middle + 8) ** 2
        )
        low, high = np.where(slope < 0, middle, low), np.where(slope < 0, high, middle)
    return torch.from_numpy(np.stack((7 * balance, high), axis=-1))
