"""This node is asked to leave: by a signal, an order or a preemption notice, and in which time."""
