"""The package's build: what pip and `python -m build` run. It imports neither PyTorch nor gptkern."""
