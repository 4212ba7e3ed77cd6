"""`pytest benchmarks`: every op beside eager PyTorch and torch.compile, in one run, behind a correctness gate."""
