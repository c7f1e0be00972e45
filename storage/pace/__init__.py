"""When to save: what a script asks for, and what follows from the time that steps and saves take. Pure."""
