"""Scores on held-out data: answer loss, exact match, perplexity, multiple choice."""
