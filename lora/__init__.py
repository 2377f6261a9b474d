"""Low-rank adapters for any module tree of `nn.Linear`. Knows nothing of Qwen2 or data."""
