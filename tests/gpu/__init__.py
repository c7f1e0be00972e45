"""What needs an accelerator to be seen: `python -m tests.gpu`, in `make check-gpu`.

Every check has a form for the CPU, which the suite runs. It needs no network, and of the packages only those in
`checks.NEEDED`; from a copied working tree it runs without being installed.
"""
