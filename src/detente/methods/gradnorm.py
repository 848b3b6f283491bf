"""GradNorm: learned loss weights that even out the gradient norms."""

from __future__ import annotations

import numpy as np
import torch

from detente.geometry.adam import adam_step
from detente.geometry.softmax import softmax
from detente.methods.base import Declaration, Method
from detente.methods.checks import positive_losses
from detente.methods.options import number
from detente.methods.registry import register
from detente.values import Combination, TaskGradients


@register
class GradNorm(Method):
    """GradNorm: learn loss weights that give every task a gradient of a length fitting its rate of training.

    With n_t = ‖g_t‖, the relative inverse training rate r_t = (L_t / L_t(0)) / mean_j (L_j / L_j(0)) and the targets
    mean_j(w_j n_j) r_t^α held constant, the weights descend along Σ_t |w_t n_t - target_t| (Chen et al. 2018,
    equation 2 and Algorithm 1). A task that lags behind (r > 1) gets a longer gradient.

    Paper and codes let the weights move freely and rescale them to the sum T, so that one can turn negative; here
    w = T softmax(u) over the T tasks present, positive by construction, and Adam moves u. The objective is measured
    in units of mean_j(w_j n_j): ``lr`` means the same at every scale of the gradients. L_t(0) is the task's first
    loss; the paper offers log C for a classification into C classes. Codes differ in α (1.5 or 2), and some multiply
    the losses by weights that are not yet rescaled. Norms are those of the shared parameters, or of the features
    with ``features=``; the paper takes the last shared layer alone: ``solve_on=``. Being a weighting of losses, it
    weighs the heads too.

    When to use it: gradients of very different length, more than one of which matters. Cost: the task gradients (one
    backward per task) and their Gramian; T numbers of state.

    Args:
        alpha: >= 0, how hard slow tasks are pulled along; 0 makes all gradients equally long.
        lr: step length of Adam on u, > 0. Ours.

    Raises:
        ValueError: an option is out of range; a loss is not positive (the rates are ratios of losses; the task is
            named).

    Example:
        >>> import detente
        >>> method = detente.create("gradnorm", lr=0.1)
        >>> for _ in range(100):
        ...     weights = detente.combine(method, torch.tensor([[1.0, 0], [0, 3]]), losses=[1.0, 1.0]).weights
        >>> [round(float(weight), 1) for weight in weights]
        [1.5, 0.5]
    """

    declares = Declaration(
        name="gradnorm",
        source="Chen et al. 2018, equation 2, Algorithm 1",
        needs=frozenset({"losses", "gramian"}),
        stateful=True,
        native_scale="sum",
        homogeneity=1,
        permutation="exact",
        heads="weighted",
        search={"alpha": (0.0, 0.5, 1.5, 2.0), "lr": (0.001, 0.005, 0.025, 0.1)},
    )

    logits: torch.Tensor
    moments: torch.Tensor
    first_losses: torch.Tensor

    def __init__(self, *, alpha: float = 1.5, lr: float = 0.025) -> None:
        super().__init__()
        self.alpha = number("alpha", alpha, least=0)
        self.lr = number("lr", lr, above=0)

    def allocate(self, tasks: int) -> None:
        """u, and the first loss of every task (0 until it is known)."""
        self.register_buffer("logits", torch.zeros(tasks, dtype=torch.float64))
        self.register_buffer("moments", torch.zeros(tasks, 3, dtype=torch.float64))
        self.register_buffer("first_losses", torch.zeros(tasks, dtype=torch.float64))

    def solve(self, gradients: TaskGradients) -> Combination:
        """The weights as they are; then u takes one step."""
        assert gradients.gramian is not None
        losses = positive_losses(self, gradients, "compares losses by ratio")
        at = self.positions(gradients.names)
        logits, moments, first = self.logits.numpy(), self.moments.numpy(), self.first_losses.numpy()
        shares = softmax(logits[at])
        weights = gradients.tasks * shares
        started = np.where(first[at] > 0, first[at], losses)
        slope = _slope(weights, np.sqrt(np.diagonal(gradients.gramian)), losses / started, self.alpha)
        # Through the softmax: what moves all weights alike moves none of them.
        slope = weights * (slope - shares @ slope)
        logits[at], moments[at] = adam_step(logits[at], moments[at], slope, lr=self.lr)
        first[at] = started
        return Combination(weights=torch.from_numpy(weights))


def _slope(weights: np.ndarray, norms: np.ndarray, progress: np.ndarray, alpha: float) -> np.ndarray:
    """[T] derivative by each weight of Σ |w n - target|, targets constant, in units of the mean weighted norm."""
    lengths = weights * norms
    mean = lengths.mean()
    if mean == 0:
        return np.zeros(len(weights))  # every gradient vanishes: nothing to even out
    targets = mean * (progress / progress.mean()) ** alpha
    slope: np.ndarray = np.sign(lengths - targets) * (norms / mean)
    return slope
