"""The checkpoint service: one process a node that takes over what ranks have staged, and outlives them."""
