"""What the Makefile calls: environment, book, notebooks, checks."""
