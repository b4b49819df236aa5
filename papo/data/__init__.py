"""Problems: rows of files and datasets, or generated ones, made into prompts and answers."""
