"""Pure float64 mathematics on Gramians, T×T matrices of inner products of task gradients. numpy only, no state.

`gramian`: checks and scaling; `simplex`: shortest vector of the convex hull; `spectrum`: eigenvalues, rank, condition
number; `conflict`: measures of disagreement. Import from those files.
"""
