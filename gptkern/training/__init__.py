"""Training as a library: what the commands and the bench share."""
