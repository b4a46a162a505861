"""The cuda backend: launchers over the kernels of csrc/, compiled by nvcc (gptkern._cuda) or for the emulator.

A launcher checks nothing: it allocates outputs with PyTorch and calls a function of the compiled module with
addresses, sizes and strides. The compiled module knows no PyTorch, so one build serves every version of it.
"""
