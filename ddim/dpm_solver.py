"""DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095): fast samplers of orders 1 to 3 for any noise-predicting callable.

The ODE is solved in lambda, half the logarithm of the signal-to-noise ratio, with the model read as a predictor of the
image ("data prediction"). Between the training timesteps log(alpha) is interpolated linearly, and time is measured in
training timesteps from 0 to T - 1, fractions included, which is also what the model is given.

Symbols follow the paper: alpha and sigma scale image and noise, alpha^2 + sigma^2 = 1; lambda = log(alpha / sigma);
h is a step's length in lambda; r places an inner or earlier node as a fraction of h; phi_k are the integrals of the
exponential against polynomials of degree k - 1 that the exponential integrator needs (also arXiv 2206.00927).
Everything but x is a Python float, so that the loop never waits for an accelerator.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddim.samplers import EpsilonModel, OnStep, timestep_batch

METHODS = ("singlestep", "multistep")
SKIP_TYPES = ("time_uniform", "time_quadratic", "logSNR")
ORDERS = (1, 2, 3)

# With fewer steps than this the multistep solver lowers its order towards the end: the last stretch, where lambda moves
# fastest, is then too long to extrapolate over.
STEADY_FROM = 15


class Node(NamedTuple):
    """A point of the trajectory: time in training timesteps and the coefficients there."""

    t: float
    alpha: float
    sigma: float
    lam: float


class NoiseSchedule:
    """A discrete schedule made continuous.

    Args:
        alpha_bar: T cumulative products; alpha = sqrt(alpha_bar) at the whole timesteps 0 ... T - 1.
    """

    def __init__(self, alpha_bar: Tensor):
        self._log_alpha = 0.5 * np.log(alpha_bar.detach().double().cpu().numpy())  # T, falling
        self._times = np.arange(len(self._log_alpha), dtype=np.float64)

    @property
    def last(self) -> float:
        """The noisiest timestep, T - 1."""
        return float(self._times[-1])

    def node(self, t: float) -> Node:
        log_alpha = float(np.interp(t, self._times, self._log_alpha))
        log_sigma = 0.5 * math.log(-math.expm1(2 * log_alpha))
        return Node(t, math.exp(log_alpha), math.exp(log_sigma), log_alpha - log_sigma)

    def time_of(self, lam: float) -> float:
        """Inverse of lambda(t): log(alpha) follows from lambda since alpha^2 + sigma^2 = 1."""
        log_alpha = -0.5 * np.logaddexp(0.0, -2.0 * lam)
        return float(np.interp(log_alpha, self._log_alpha[::-1], self._times[::-1]))

    def grid(self, skip_type: str, start: float, end: float, intervals: int) -> list[float]:
        """``intervals`` + 1 times from ``start`` down to ``end``, evenly spaced in what ``skip_type`` names."""
        if skip_type == "logSNR":
            lams = np.linspace(self.node(start).lam, self.node(end).lam, intervals + 1)[1:-1]
            return [start, *(self.time_of(lam) for lam in lams), end]
        if skip_type == "time_quadratic":  # time counted from the clean image, one timestep before 0
            return (np.square(np.linspace((start + 1) ** 0.5, (end + 1) ** 0.5, intervals + 1)) - 1).tolist()
        return np.linspace(start, end, intervals + 1).tolist()


@torch.no_grad()
def dpm_solver_sample(
    model: EpsilonModel,
    x: Tensor,
    alpha_bar: Tensor,
    *,
    steps: int,
    order: int = 2,
    method: str = "multistep",
    skip_type: str = "time_uniform",
    on_step: OnStep | None = None,
) -> Tensor:
    """Sample with ``steps`` model calls, from timestep T - 1 to timestep 0.

    Args:
        model: (x, N fractional timesteps) -> eps like x. Guidance is the caller's wrapper around it.
        x: starting noise, N x C x H x W.
        alpha_bar: T cumulative products (:func:`ddim.schedule.alphas_cumprod`).
        steps: model calls; ``singlestep`` spends up to ``order`` of them on each of its steps.
        order: 1 (which is DDIM), 2 or 3.
        method: ``multistep`` keeps earlier predictions, ``singlestep`` makes intermediate ones.
        skip_type: ``time_uniform``, ``time_quadratic`` or ``logSNR``.
        on_step: sees the input of each model call beforehand, intermediate ones included.

    Raises:
        ValueError: an unknown method, skip type or order, or steps below 1.
    """
    for name, value, allowed in (("method", method, METHODS), ("skip_type", skip_type, SKIP_TYPES)):
        if value not in allowed:
            raise ValueError(f"{name} {value!r} is not one of {', '.join(allowed)}")
    if order not in ORDERS:
        raise ValueError(f"order {order} is not one of 1, 2, 3")
    if not 1 <= steps <= len(alpha_bar):
        raise ValueError(f"steps {steps} must lie between 1 and {len(alpha_bar)}, the schedule's timesteps")
    schedule = NoiseSchedule(alpha_bar)
    predict = _image_predictor(model, on_step)
    if method == "multistep":
        return _multistep(predict, x, schedule, schedule.grid(skip_type, schedule.last, 0.0, steps), order)
    return _singlestep(predict, x, schedule, steps, order, skip_type)


_Predictor = Callable[[Tensor, Node], Tensor]


def _image_predictor(model: EpsilonModel, on_step: OnStep | None) -> _Predictor:
    """x_theta of the paper: the image that the model's noise estimate implies."""
    calls = 0

    def predict(x: Tensor, node: Node) -> Tensor:
        nonlocal calls
        if on_step is not None:
            on_step(calls, node.t, x)
        calls += 1
        eps = model(x, timestep_batch(node.t, x))
        return (x - node.sigma * eps) / node.alpha

    return predict


def _multistep(predict: _Predictor, x: Tensor, schedule: NoiseSchedule, times: list[float], order: int) -> Tensor:
    """Algorithm 2 of the paper (2M) and its extension to order 3; early steps have the order history allows."""
    nodes = [schedule.node(t) for t in times]
    steps = len(nodes) - 1
    history: deque[tuple[Node, Tensor]] = deque(maxlen=order)  # newest last
    for k in range(steps):
        history.append((nodes[k], predict(x, nodes[k])))
        usable = min(len(history), steps - k) if steps < STEADY_FROM else len(history)
        x = _from_history(x, list(history)[-usable:], nodes[k + 1])
    return x


def _from_history(x: Tensor, history: list[tuple[Node, Tensor]], end: Node) -> Tensor:
    """One step from the newest node of ``history`` to ``end``, of order ``len(history)``."""
    start, d0 = history[-1]
    h = end.lam - start.lam
    stepped = _first_order(x, d0, start, end)
    if len(history) == 1:
        return stepped

    previous, d1 = history[-2]
    r0 = (start.lam - previous.lam) / h
    slope = (d0 - d1) / r0  # first derivative of x_theta, times h
    phi1, phi2, phi3 = _phis(h)
    if len(history) == 2:
        return stepped - 0.5 * end.alpha * phi1 * slope

    before, d2 = history[-3]
    r1 = (previous.lam - before.lam) / h
    bend = 2 * (slope - (d1 - d2) / r1) / (r0 + r1)  # second derivative, times h^2; without the 2 the order is 2
    return stepped + end.alpha * phi2 * (slope + r0 * bend / 2) - end.alpha * phi3 * bend


def _singlestep(
    predict: _Predictor, x: Tensor, schedule: NoiseSchedule, steps: int, order: int, skip_type: str
) -> Tensor:
    """Steps of the given order back to back; the last ones are shorter so that ``steps`` calls are spent exactly."""
    orders = single_step_orders(steps, order)
    if skip_type == "logSNR":  # even in lambda between the long steps, whatever their order
        times = schedule.grid(skip_type, schedule.last, 0.0, len(orders))
    else:
        fine = schedule.grid(skip_type, schedule.last, 0.0, steps)
        times = [fine[index] for index in np.cumsum([0, *orders])]
    for step_order, begin, finish in zip(orders, times[:-1], times[1:], strict=True):
        nodes = [schedule.node(t) for t in schedule.grid(skip_type, begin, finish, step_order)]
        x = _through_nodes(predict, x, nodes)
    return x


def single_step_orders(steps: int, order: int) -> list[int]:
    """Orders of the steps that spend ``steps`` model calls: full ones, then what is left.

    Order 3 never ends on a full step, but on a second-order and a first-order one (DPM-Solver-fast, arXiv 2206.00927).
    """
    full, rest = divmod(steps, order)
    if order == 3 and rest == 0:
        return [3] * (full - 1) + [2, 1]
    return [order] * full + [rest] * (rest > 0)


def _through_nodes(predict: _Predictor, x: Tensor, nodes: list[Node]) -> Tensor:
    """One singlestep update through intermediate predictions: order 1, 2 (2S, algorithm 1) or 3.

    Args:
        nodes: start, the inner nodes s_1 (and s_2), end: the order is one less than their number.
    """
    start, inner, end = nodes[0], nodes[1:-1], nodes[-1]
    h = end.lam - start.lam
    d0 = predict(x, start)
    stepped = _first_order(x, d0, start, end)
    if not inner:
        return stepped

    s1, r1 = inner[0], (inner[0].lam - start.lam) / h
    difference = predict(_first_order(x, d0, start, s1), s1) - d0
    if len(inner) == 1:
        return stepped - end.alpha * _phis(h)[0] * difference / (2 * r1)

    s2, r2 = inner[1], (inner[1].lam - start.lam) / h
    at_s2 = _first_order(x, d0, start, s2) + (r2 / r1) * s2.alpha * _phis(r2 * h)[1] * difference
    difference = predict(at_s2, s2) - d0
    return stepped + end.alpha * _phis(h)[1] * difference / r2


def _first_order(x: Tensor, d0: Tensor, start: Node, end: Node) -> Tensor:
    """Exact where the prediction is constant over the step (the paper's DPM-Solver++1, which is DDIM with eta 0)."""
    return (end.sigma / start.sigma) * x - end.alpha * math.expm1(start.lam - end.lam) * d0


def _phis(h: float) -> tuple[float, float, float]:
    """Weights of the prediction, its first and its second derivative: e^-h less ever more of its Taylor series."""
    phi1 = math.expm1(-h)
    phi2 = phi1 / h + 1
    phi3 = phi2 / h - 0.5
    return phi1, phi2, phi3
