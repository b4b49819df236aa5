"""The torch operations: schemas, fake implementations, autograd."""
