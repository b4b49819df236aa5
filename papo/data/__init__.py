"""Problems: rows of files and data sets, made into prompts and answers."""
