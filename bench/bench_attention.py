"""attention against PyTorch's SDPA backends, FlexAttention, flash-attn."""

OPERATOR = "attention"


def test_attention(cell, implementation, measured):
    measured(cell, implementation)
