"""The job in the store: this node's record and lease, who leads, what the leader does, and a look from outside."""
