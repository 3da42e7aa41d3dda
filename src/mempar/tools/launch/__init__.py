"""`mempar launch`: a run on other machines, through ssh or a scheduler.

hostfile     which hosts there are, and how many ranks each takes
reach        whether ssh gets to all of them, and finds there what a run needs

What happens on a host is mempar.runtime.launch's; nothing here imports torch.
"""
