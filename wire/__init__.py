"""What two processes must agree on. Imports no torch."""
