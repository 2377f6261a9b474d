"""From rows of text to flat micro-batches of token ids. Knows nothing of the model or the adapters."""
