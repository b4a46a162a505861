"""int8_linear against torch._int_mm, 16-bit linear layers, torchao, bitsandbytes."""

OPERATOR = "int8_linear"


def test_int8_linear(cell, implementation, measured):
    measured(cell, implementation)
