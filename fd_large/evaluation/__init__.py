"""Protocols that measure and compare models, listed in `registry.py`; users can add their own.

k-NN and linear probes on features are computed in `probes/`, and models are trained in `tasks/`.
`cli/` parses the command line and prints the results.
"""
