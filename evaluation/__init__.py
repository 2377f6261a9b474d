"""Evaluation: tasks, generation, scorers, votes, statistics, kinds of mistakes."""
