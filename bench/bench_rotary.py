"""rotary against plain PyTorch and torch.compile."""

OPERATOR = "rotary"


def test_rotary(cell, implementation, measured):
    measured(cell, implementation)
