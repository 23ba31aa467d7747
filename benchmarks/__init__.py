"""What is run to be recorded; each record says on what and when."""
