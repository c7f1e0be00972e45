"""The demo: a small model survives the loss of a node, and the node's return, on one machine.

`story` and `summary` are pure functions of what the nodes recorded, `plot` draws it, `driver` runs the processes.
"""
