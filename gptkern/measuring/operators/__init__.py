"""For each operator: its cells, inputs, implementations and reference."""
