"""Forecasts: weights with which what the last full steps computed is put together to what a cached step needs.

A forecast of order o weighs the last o + 1 full steps, the newest first. Pure arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Final

import numpy as np

from hemiola_runtime.schedule import Forward, Step
from hemiola_search.calibration import Calibration, Floats

TINY: Final = 1e-30  # where they do not differ at all
RIDGE: Final = 1e-3  # keeps weights small where the last full steps hardly differ

Weigh = Callable[[int, tuple[int, ...]], tuple[float, ...]]  # of a step and full steps before it, the newest first


def taylor(step: int, full_steps: tuple[int, ...]) -> tuple[float, ...]:
    """Return the weights of TaylorSeer (arXiv:2503.06923, eq. 5): Σ_i D_i k^i / i! over k elapsed steps.

    D_0 is the newest feature, and D_i+1 = (D_i - what D_i was a full step before) / (steps between the two).
    Of order 1 it is the line through two features; from order 2 on, differences are not derivatives, and it is not
    exact for the polynomials that the order promises.

    Args:
        step: that is forecast.
        full_steps: before it, the newest first; their number gives the order.
    """
    elapsed, count = step - full_steps[0], len(full_steps)
    # differences[age] of the current order, as weights of the features
    differences = [[float(i == age) for i in range(count)] for age in range(count)]
    weights = [0.0] * count
    for order in range(count):
        factor = elapsed**order / math.factorial(order)
        weights = [weight + factor * term for weight, term in zip(weights, differences[0], strict=True)]
        differences = [
            [(new - old) / (full_steps[age] - full_steps[age + 1]) for new, old in zip(*pair, strict=True)]
            for age, pair in enumerate(pairwise(differences))
        ]
    return tuple(weights)


def polynomial(step: int, full_steps: tuple[int, ...]) -> tuple[float, ...]:
    """Return the weights of the polynomial through the features (Lagrange's form), whatever lies between them."""
    weights = []
    for mine in full_steps:
        others = [other for other in full_steps if other != mine]
        weight = 1.0
        for other in others:
            weight *= (step - other) / (mine - other)
        weights.append(weight)
    return tuple(weights)


def with_forecasts(
    steps: Sequence[Step], order: int, weigh: Weigh = taylor, forward: Forward = Forward.REUSE
) -> tuple[Step, ...]:
    """Let every step that reads the cache forecast it, by as many full steps as there are up to `order` + 1.

    With `residual`, plain `reuse` gives way to it as soon as there are two full steps to forecast by.
    """
    changed, full_steps = [], tuple[int, ...]()
    for i, step in enumerate(steps):
        if step.forward is Forward.FULL:
            full_steps = (i, *full_steps)[: order + 1]
            changed.append(step)
        else:
            forecast = weigh(i, full_steps) if len(full_steps) > 1 else ()
            is_residual = step.forward is Forward.REUSE and forward is Forward.RESIDUAL and forecast
            changed.append(Step(Forward.RESIDUAL if is_residual else step.forward, step.tokens, forecast))
    return tuple(changed)


class Fitted:
    """Forecasts fitted to a calibrated model: the weights, summing to 1, whose output is nearest to the true one.

    A least-squares fit for each step on the outputs of the model, in which all caches are weighed alike. TaylorSeer's
    weights are one choice of the same form.
    """

    def __init__(self, calibration: Calibration, forward: Forward = Forward.REUSE) -> None:
        """Set up for `reuse`, whose forecasts are of layers, or for `residual`."""
        self._calibration = calibration
        self._forward = forward
        self._known: dict[tuple[int, ...], tuple[Floats, Floats]] = {}

    def weigh(self, step: int, full_steps: tuple[int, ...]) -> tuple[float, ...]:
        """Return the weights for one step."""
        weights, _ = self._fit(full_steps)
        return tuple(map(float, weights[step - full_steps[0] - 1]))

    def errors(self, full_steps: tuple[int, ...]) -> Floats:
        """Estimate by how much a forecast changes the final latents, relative L2, at every step behind full ones."""
        return self._fit(full_steps)[1]

    def _fit(self, full_steps: tuple[int, ...]) -> tuple[Floats, Floats]:
        """Fit the weights (n, o + 1) and errors (n,) of all n steps behind the newest of o + 1 full ones."""
        if full_steps not in self._known:
            later, places = slice(full_steps[0] + 1, None), np.array(full_steps)
            is_residual = self._forward is Forward.RESIDUAL and len(places) > 1  # behind one full step, plain reuse
            outputs = self._calibration.residual_outputs if is_residual else self._calibration.outputs
            products = outputs[later]  # (n, T, T)
            steps = np.arange(len(products)) + full_steps[0] + 1
            between = products[:, places[:, None], places]  # (n, o + 1, o + 1)
            with_true = products[np.arange(len(steps))[:, None], places, steps[:, None]]  # (n, o + 1)
            weights = np.zeros((len(steps), len(places)))
            weights[:, 0] = 1
            if len(places) > 1:  # how far to go from each of the others towards the newest, and beyond
                towards = np.concatenate([np.ones((len(places) - 1, 1)), -np.eye(len(places) - 1)], axis=1)
                system = towards @ between @ towards.T
                ridge = RIDGE * np.trace(system, axis1=1, axis2=2)[:, None, None] / len(towards)
                system = system + np.maximum(ridge, TINY) * np.eye(len(towards))
                missing = (with_true - (between @ weights[..., None])[..., 0]) @ towards.T
                weights += np.linalg.solve(system, missing[..., None])[..., 0] @ towards
            squared = (
                products[np.arange(len(steps)), steps, steps]
                - 2 * (weights * with_true).sum(axis=1)
                + np.einsum("na,nab,nb->n", weights, between, weights)
            )
            errors = np.sqrt(np.maximum(squared, 0)) * self._calibration.sensitivity[later]
            self._known[full_steps] = weights, errors
        return self._known[full_steps]
