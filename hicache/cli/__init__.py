"""The command line: the composition root, and the only reader of the environment (``config``)."""
