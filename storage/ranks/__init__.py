"""The ranks that checkpoint together, and how they succeed or fail together."""
