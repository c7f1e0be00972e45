"""The threads around a node's engine, what its agent sees of it, and a look at a job from outside."""
