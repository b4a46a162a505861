"""layer_norm against PyTorch's own, torch.compile, Liger-Kernel, quack."""

OPERATOR = "layer_norm"


def test_layer_norm(cell, implementation, measured):
    measured(cell, implementation)
