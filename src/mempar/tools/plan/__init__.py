"""`mempar plan`: which layouts a run could take on some GPUs, how fast each would be, and why; arithmetic alone."""
