"""The cluster's front: HTTP in, tokens relayed from a pair of workers, text out. Imports no torch."""
