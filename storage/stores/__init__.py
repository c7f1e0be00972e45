"""Bytes with names: the contract of an object store, and every back end that keeps it."""
