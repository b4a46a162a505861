"""The cuda backend: launchers over the kernels of csrc/, compiled by nvcc (gptkern._cuda) or for the emulator.

A launcher checks nothing: it allocates outputs with PyTorch and calls a function of the compiled module, which reads
tensors by DLPack's table of C functions (csrc/tensor_caster.h) and knows no PyTorch: one build serves every version.
"""
