"""What torch's elastic agent meets: our agent and rendezvous, the handler behind torchrun, and their configuration."""
