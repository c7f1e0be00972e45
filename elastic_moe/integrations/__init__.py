"""The worker's contract and sharded checkpoints for scripts that a framework drives: a module for each framework.

Importing this package imports neither torch nor any framework; each module imports its own. See docs/integrations.md.
"""
