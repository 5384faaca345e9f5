"""What the configurations of one signature gain, those never measured included: a Gaussian process over configurations.

Within a group gains do not add up: a fused attention is left as soon as one of its products is lowered, products that read the same
activations share their cast. Which ops interact, and how much, differs between devices, so the measurements say it themselves.
The covariance of two configurations is a product over ops,

    k(c, c') = σ² Π_i (1 + a_i [c_i = c'_i]) / (1 + a_i),

which multiplied out is a term for every subset of ops: single changes, pairs, triples…, the higher ones the smaller. A small a_i
makes op i nearly additive, a large one lets it change what all others gain. σ and the a_i are those that the measured gains make
likeliest (marginal likelihood: Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006, eq. 5.8; times a wide prior), each
gain with the error of its own interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

Configuration: TypeAlias = tuple[str, ...]
# for each op of a group the formats that it may take, base first
Choices: TypeAlias = Sequence[Sequence[str]]
STEPS, LEARN_FROM = 100, 256  # iterations; gains that σ and the a_i are learnt from, at most
WIDE = 3.0  # deviation of log σ² and of log a_i, normal a priori, gains in units of their root mean square
JITTER = 1e-6  # times σ², on the diagonal: two measurements of one configuration differ a little


@dataclass(frozen=True)
class GainModel:
    """Gains (s) of a signature's configurations given those measured. `a`, (ops,): how much each op changes what the others gain."""

    choices: tuple[tuple[str, ...], ...]
    a: np.ndarray
    _variance: torch.Tensor  # σ², in units of _unit_s²
    _measured: torch.Tensor  # codes, (n, ops)
    _root: torch.Tensor  # lower triangular root of the measured gains' covariance, (n, n)
    _weights: torch.Tensor  # its inverse times the gains, (n,)
    _unit_s: float

    @classmethod
    def fit(
        cls,
        choices: Choices,
        configurations: Sequence[Configuration],
        gains_s: Sequence[float],
        errors_s: Sequence[float],
    ) -> GainModel:
        """`errors_s` are the standard errors of the measured gains. That all-base gains nothing is certain, measured or not.

        A configuration may come twice. Raises ValueError where a format is not among its op's choices, or nothing was measured.
        """
        fixed = tuple(tuple(c) for c in choices)
        if not len(configurations):
            raise ValueError("no gains to fit")
        gains, errors = np.append(gains_s, 0.0), np.append(errors_s, 0.0)
        unit = float(np.sqrt(np.mean(gains**2))) or 1.0
        y, noise = torch.tensor(gains / unit), torch.tensor((errors / unit) ** 2)
        x = _codes(fixed, [*configurations, tuple(c[0] for c in fixed)])
        some = torch.as_tensor(np.random.default_rng(0).permutation(len(y))[:LEARN_FROM])
        q = _likeliest(x[some], y[some], noise[some])
        root = _root(q, _same(x, x), noise)
        weights = torch.cholesky_solve(y[:, None], root)[:, 0]
        return cls(fixed, q[1:].exp().numpy(), q[0].exp(), x, root, weights, unit)

    def predict(self, configurations: Sequence[Configuration]) -> tuple[np.ndarray, np.ndarray]:
        """Gains and their standard errors in seconds, each (configurations,).

        For a measured configuration this is what it and all others say together.
        """
        cov = self._with_measured(configurations)
        explained = torch.linalg.solve_triangular(self._root, cov.T, upper=False).square().sum(0)
        error = (self._variance - explained).clamp(min=0).sqrt()
        return (cov @ self._weights).numpy() * self._unit_s, error.numpy() * self._unit_s

    def parts(
        self, configurations: Sequence[Configuration], measured_s: Sequence[float]
    ) -> np.ndarray:
        """What the measured configurations say of one part of the gain, (configurations,), when `measured_s` is that part of theirs.

        Weighed as the whole gain is: parts add up to what predict says of their sum.
        """
        y = torch.tensor([*measured_s, 0.0], dtype=torch.float64)
        cov = self._with_measured(configurations)
        return (cov @ torch.cholesky_solve(y[:, None], self._root)[:, 0]).numpy()

    def _with_measured(self, configurations: Sequence[Configuration]) -> torch.Tensor:
        same = _same(_codes(self.choices, configurations), self._measured)
        return _covariance(self._variance, torch.tensor(self.a), same)

    def left_out(self) -> np.ndarray:
        """For each measured configuration, (n,), the error (s) of its prediction from all others (ibid., eq. 5.12)."""
        inverse = torch.cholesky_inverse(self._root)
        return (self._weights / inverse.diagonal()).numpy()[:-1] * self._unit_s


def _codes(
    choices: tuple[tuple[str, ...], ...], configurations: Sequence[Configuration]
) -> torch.Tensor:
    """For each configuration and op the place of its format among the op's choices, (n, ops)."""
    pairs = (zip(configuration, choices, strict=True) for configuration in configurations)
    return torch.tensor([[of.index(f) for f, of in each] for each in pairs])


def _same(x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    """For each op, (n, m): where configurations x (n, ops) and y (m, ops) have the same format."""
    return [x[:, None, i] == y[None, :, i] for i in range(x.shape[1])]


def _covariance(
    variance: torch.Tensor, a: torch.Tensor, same: Sequence[torch.Tensor]
) -> torch.Tensor:
    """σ² Π_i (1 + a_i same_i) / (1 + a_i); each same_i, (n, m), tells where op i has the same format."""
    cov = variance * torch.ones(same[0].shape, dtype=torch.float64)
    for scale, equal in zip(a, same, strict=True):
        cov = cov * torch.where(equal, 1.0, 1 / (1 + scale))
    return cov


def _root(q: torch.Tensor, same: Sequence[torch.Tensor], noise: torch.Tensor) -> torch.Tensor:
    """Lower triangular root of the measured gains' covariance, q being log σ² and the log a_i."""
    variance = q[0].exp()
    root: torch.Tensor = torch.linalg.cholesky(
        _covariance(variance, q[1:].exp(), same) + torch.diag(noise + JITTER * variance)
    )
    return root


def _likeliest(x: torch.Tensor, y: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """log σ² and the log a_i that gains y of configurations x make likeliest, given the prior."""
    same = _same(x, x)
    q = torch.tensor([0.0] + [-1.0] * x.shape[1], dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([q], max_iter=STEPS, line_search_fn="strong_wolfe")

    def unlikeliness() -> torch.Tensor:
        search.zero_grad()
        root = _root(q, same, noise)
        z = torch.linalg.solve_triangular(root, y[:, None], upper=False)
        value: torch.Tensor = (
            z.square().sum() / 2 + root.diagonal().log().sum() + (q / WIDE).square().sum() / 2
        )
        value.backward()
        return value

    search.step(unlikeliness)
    return q.detach()
