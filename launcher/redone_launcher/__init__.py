"""The redone command: run, data, doctor, report."""
