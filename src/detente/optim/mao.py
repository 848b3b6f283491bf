"""Multi-Adaptive Optimization: one Adam for every task, one step for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, cast, final

import torch

from detente.methods import Method
from detente.methods.options import one_of
from detente.optim.base import TaskOptimizer
from detente.optim.kernels import (
    Bundle,
    Form,
    alike,
    contribution_means,
    fresh_moments,
    mean_size,
    subtract,
)
from detente.optim.update import Update


@final
class MAO(TaskOptimizer):
    """Multi-Adaptive Optimization: an effective learning rate for every parameter and task.

    Each shared parameter θ keeps, for each task n, running averages m of the task's gradient and v of its square, and
    moves once per step by -η Σ_n m̂_n / (√v̂_n + ε) - η λ θ (Hervella et al. 2024, equations 8 to 12). Every task thus
    contributes about alike to every parameter, whatever the units of its loss: multiplying one loss by a constant
    changes nothing but the weight of ε. The contributions are near-equal, not equal: a task whose gradient keeps its
    sign from step to step contributes more than one whose gradient is mostly noise. With T tasks that agree the
    step is T times that of Adam.

    AdaTask (Yang et al. 2023, with Adam) is the same update.

    Where paper and this class differ. The paper prints the bias correction as (1 - β2^t) / (1 - β1^t), without the
    root that Adam has, and ε inside the root of equation 8. Without the root every step is multiplied by √(1 - β2^t),
    0.03 at the first step and 0.31 at the hundredth: a hidden warm-up. Inside the root ε = 1e-8 is a floor of 1e-4 for
    the denominator, under which a task with small gradients loses its normalisation. The default has Adam's root and
    Adam's ε, so that one task gives ``torch.optim.Adam`` or, with weight decay, ``AdamW``; ``bias_correction="paper"``
    is the literal form.

    Task-specific parameters take plain Adam steps (Adam's correction, the same β, ε and weight decay) along the sum of
    the gradients that reach them. Which loss they belong to is seen from which loss has a gradient for them. A shared
    parameter that only one loss reaches moves as under Adam too, so that the trunk may be named generously.

    Cost: a forward and T backwards per step, memory for 2 T P numbers of state, P numbers for the update and one task's
    gradient at a time, P being the number of shared entries; gradients of task-specific parameters are held to the end
    of the step, and ``.grad`` is not used. Measuring contributions, and every form but ``bias_correction="adam"``, hold
    a denominator beside that, of the largest tensor or of some tensors with a million entries together. Every task's
    gradient is looked at for NaN, which waits for the device.
    With ``transform`` T P more, kept from step to step, and one altered gradient; a method alters all of them or none,
    so they must be there together.

    Counters of steps are kept for each task and parameter, so that a task that joins late or is absent from some
    batches is corrected for what it has seen; its moments wait meanwhile.

    A layer of ``balance`` is one shared tensor, called by its name in the module it came from, by the name given
    (``named_parameters()``), or by position and shape.

    Args:
        shared: parameters, modules, or parameter groups (mappings with ``params``, ``lr``, …) that several tasks move.
        task_specific: the others, likewise; also a mapping from a name to a head.
        tasks: names or number of the tasks, in the order of their backwards; None learns them from the losses, and
            then a new name may appear later.
        lr: learning rate η; a group may have its own, and schedulers may change it.
        betas: decay rates of m and v.
        eps: ε.
        weight_decay: λ, decoupled: each step takes η λ θ away, once however many tasks there are.
        variant: ``adam``; or ``sgd``: -η Σ_n g_n / √(v_n + ε) (equations 8 and 9) for the shared parameters: no
            momentum, no correction (the first steps are 1 / √(1 - β2) times η, 32 by default), a floor of √ε.
        bias_correction: of ``variant="adam"``: ``adam``; ``paper``: the literal equations 8 and 10; ``none``.
        transform: a detente method that alters the task gradients before they are averaged (PCGrad then MAO). A step
            it refuses leaves everything as it was; one of which a guard refuses the shared part moves the task-specific
            parameters alone. Call its hooks (``end_epoch``) yourself if it has any; its state is
            saved with this optimizer's.

    Attributes:
        tasks: the tasks known so far, None before the first step.
        transform: as given.
        takes_transform: True.
        balance: a :class:`~detente.optim.TaskBalance` after ``step(losses, measure=True)``, None after other steps.

    Raises:
        ValueError: an option is out of range, or there are no parameters.
        TypeError: parameters, tasks, transform or the value of an option are of the wrong kind.

    Example:
        >>> trunk, heads = torch.nn.Linear(4, 8), torch.nn.ModuleDict({n: torch.nn.Linear(8, 1) for n in "ab"})
        >>> optimizer = MAO(trunk, heads, lr=0.01)
        >>> z = trunk(torch.ones(2, 4)).relu()
        >>> record = optimizer.step({name: head(z).square().mean() for name, head in heads.items()})
        >>> record.accepted, optimizer.tasks
        (True, ('a', 'b'))
    """

    takes_transform: ClassVar[bool] = True

    def __init__(
        self,
        shared: Any,
        task_specific: Any = (),
        tasks: Sequence[str] | int | None = None,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        variant: Literal["adam", "sgd"] = "adam",
        bias_correction: Literal["adam", "paper", "none"] = "adam",
        transform: Method | None = None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        if transform is not None and not isinstance(transform, Method):
            raise TypeError(
                f"transform is a {type(transform).__name__}; give a method from detente.create()."
            )
        self._updates: dict[torch.Tensor, torch.Tensor] = {}
        forms = {"variant": variant, "bias_correction": bias_correction}
        super().__init__(shared, task_specific, tasks, {**defaults, **forms}, transform)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._updates = {}

    def _check_options(self, options: Mapping[str, Any]) -> None:
        super()._check_options(options)
        one_of("variant", options.get("variant", "adam"), ("adam", "sgd"))
        one_of("bias_correction", options.get("bias_correction", "adam"), ("adam", "paper", "none"))

    def _fresh(self, parameter: torch.Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        moments = fresh_moments(parameter)
        if group["variant"] == "sgd":
            del moments["exp_avg"]
        return moments

    def _form(self, group: Mapping[str, Any]) -> Form:
        return "sgd" if group["variant"] == "sgd" else cast(Form, group["bias_correction"])

    def _take(
        self, task: str, bundles: Sequence[Bundle], lengths: Mapping[torch.Tensor, float], update: Update
    ) -> None:
        for bundle in bundles:  # nothing has moved before
            self._check_range(task, bundle, lengths, update)
        for bundle in bundles:
            subtract(bundle, self._targets(bundle, update))
            if update.gauge is not None:
                means = contribution_means(bundle)
                for layer, gradient, mean in zip(bundle.parameters, bundle.gradients, means, strict=True):
                    update.gauge.gradient(task, layer, mean_size(gradient))
                    update.gauge.contribution(task, layer, mean)

    def _moves(
        self, group: Mapping[str, Any], parameters: Sequence[torch.Tensor], update: Update
    ) -> list[torch.Tensor]:
        return [self._updates[parameter] for parameter in parameters]

    def _targets(self, bundle: Bundle, update: Update) -> list[torch.Tensor]:
        """Give the update under way, for each parameter laid out like its moments; zero where no task came before.

        Its memory is kept from step to step: P fresh numbers are slow to get from the system.
        """
        targets, again = [], []
        for parameter, square in zip(bundle.parameters, bundle.exp_avg_sqs, strict=True):
            target, first = self._updates.get(parameter), len(update.touched[parameter]) == 1
            if target is None or not alike(target, square):
                fresh = torch.zeros_like(square)
                if target is not None and not first:
                    fresh.copy_(target)  # the moments of a task before are of another dtype
                target = self._updates[parameter] = fresh
            elif first:
                again.append(target)
            targets.append(target)
        if again:
            torch._foreach_zero_(again)
        return targets
