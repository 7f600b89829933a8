"""The reference model: which one it is, and where its scores come from."""
