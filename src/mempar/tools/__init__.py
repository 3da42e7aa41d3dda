"""What users run besides training, and what prepares a run; each tool is one module."""
