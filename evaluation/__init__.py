"""What a model's answers are worth: scorers, votes, statistics, kinds of mistakes."""
