"""What a training run needs and writes."""
