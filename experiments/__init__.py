"""Studies: questions about the method, each with a protocol that was written before its figures."""
