"""A node's worker processes: how they start, warm or cold, and what they share with its agent."""
