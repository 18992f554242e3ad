"""One module for each protocol: what its body must be, how it becomes ids, and how tokens become its chunks."""
