"""From losses to task gradients.

What belongs here: checking losses and gradients (`losses`), finding which parameters the tasks share (`partition`),
taking the gradients of each task (`take`, which chooses between `exact` and `representation`; `weighted` where a sum
of losses is enough), their Gramian (`gramian`), and the single place where numbers leave the device (`host`).
Nothing here knows a method.
"""
