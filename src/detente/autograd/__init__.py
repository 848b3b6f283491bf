"""From losses to task gradients.

What belongs here: finding which parameters the tasks share (`partition`), taking the gradients of each task
(`exact`, `representation`), their Gramian (`gramian`), and the single place where numbers leave the device
(`host`). Nothing here knows a method.
"""
