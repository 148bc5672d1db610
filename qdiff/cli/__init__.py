"""What stands behind the commands in ``scripts/``: flags, errors, run folders, and the main function of each."""
