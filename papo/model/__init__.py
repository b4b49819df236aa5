"""The language model: loading it, checking it, and its attention masks."""
