"""The script's side of the contract with the agent that runs it."""
