"""softmax against PyTorch's own, torch.compile, Liger-Kernel, quack."""

OPERATOR = "softmax"


def test_softmax(cell, implementation, measured):
    measured(cell, implementation)
