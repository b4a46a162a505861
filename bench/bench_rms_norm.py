"""rms_norm against PyTorch's own, torch.compile, Liger-Kernel, quack."""

OPERATOR = "rms_norm"


def test_rms_norm(cell, implementation, measured):
    measured(cell, implementation)
