"""Pure float64 mathematics on Gramians, T×T matrices of inner products of task gradients. No state.

`gramian`: checks and scaling; `simplex`: shortest vector of the convex hull; `spectrum`: eigenvalues, rank, condition
number; `dual_cone`: nearest vectors in half-spaces (UPGrad, DualProj, CAGrad, SDMGrad), with `nonnegative` (scipy's
non-negative least squares) below it; `equations`: bargaining and equal angles (Nash-MTL, FairGrad, ConFIG); `imtl`:
equal projections. Import from those files. Measures of disagreement are in `diagnostics`.
"""
