"""Fails at once with the exit code given."""

import sys

print("cannot work like this", file=sys.stderr)
sys.exit(int(sys.argv[1]))
