"""What kernels on a GPU find wrong with an update, which is left out then; 0 if nothing."""

#: An element of a gradient is infinite or NaN, as ``finite_kernel`` says; a row is not in its
#: table, as those say that look at rows.
NONFINITE, OUTSIDE = 1, 2
