"""The `penumbra` program. It may import everything, but only when a command needs it."""
