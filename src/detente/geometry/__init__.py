"""Pure float64 mathematics on Gramians, T×T matrices of inner products of task gradients. numpy only, no state.

`gramian`: checks and scaling; `simplex`: shortest vector of the convex hull; `spectrum`: eigenvalues, rank, condition
number; `conflict`: measures of disagreement; `dual_cone`: nearest vectors in half-spaces (UPGrad, DualProj, CAGrad,
SDMGrad), with `pivoting` below it; `equations`: bargaining and equal angles (Nash-MTL, FairGrad, ConFIG); `imtl`: equal
projections. Import from those files.
"""
