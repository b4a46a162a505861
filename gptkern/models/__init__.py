"""Reference models, in stock PyTorch."""
