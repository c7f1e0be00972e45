"""What happens once this node is asked to leave, by a signal, an order or a preemption notice."""
