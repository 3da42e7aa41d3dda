"""`mempar profile`: where the time of a step goes, and what memory-parallel communication costs."""
