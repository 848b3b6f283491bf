"""BLAS of numpy and scipy on one thread for small matrices."""

from __future__ import annotations

import numpy as np
import scipy.linalg  # noqa: F401
from threadpoolctl import threadpool_info, threadpool_limits

import detente
from detente.geometry.gramian import one_thread
from detente.values import Combination, TaskGradients


def threads() -> set[int]:
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


def test_many_tasks_are_solved_on_one_thread_and_the_setting_comes_back() -> None:
    with threadpool_limits(2, user_api="blas"):
        before = threads()
        with one_thread(100):
            assert threads() == {1}
        with one_thread(2):
            assert threads() == before, "for few tasks the switch would cost more than it saves"
        assert threads() == before


def test_a_method_is_asked_on_one_thread() -> None:
    seen: list[set[int]] = []

    class Looking(type(detente.create("uniform"))):  # type: ignore[misc]
        def solve(self, gradients: TaskGradients) -> Combination:
            seen.append(threads())
            return super().solve(gradients)

    with threadpool_limits(2, user_api="blas"):
        Looking().combine(TaskGradients(names=tuple(map(str, range(64))), gramian=np.eye(64)))
    assert seen == [{1}]
