"""Who computes a call, and why: dispatch, registration with PyTorch, tables, and what launchers share."""
