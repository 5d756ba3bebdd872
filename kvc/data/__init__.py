"""Data: one module per task or record format; importing the package loads nothing heavy."""
