"""From a state to data objects, and from those to a commit."""
