"""From rows of text to flat micro-batches of token ids. Knows nothing of model or adapters."""
