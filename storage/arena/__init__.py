"""Memory in which a rank's state is staged: slots without a name, what is copied into them, and when."""
