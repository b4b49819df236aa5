"""What computes: the protocol, the choice, and one module or package a backend."""
