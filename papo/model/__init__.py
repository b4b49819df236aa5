"""The language model: loading it, and what is checked of it."""
