"""What one run needs and leaves behind."""
