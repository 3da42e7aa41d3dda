"""`mempar launch`: a run on this machine, on hosts over ssh, or as a job of a scheduler.

command                 from a recipe to a run's directory, and starting it
profile, profile_file   what a cluster needs to know of itself
provenance              what a run came from, as it is saved before anything starts
restarts                starting a run again after a failure
hostfile                which hosts there are, and how many ranks each takes
reach                   whether ssh gets to all of them, and finds there what a run needs
places                  where ranks can be started, and ports to meet at
connection, node_shell  a command that reaches nodes, and the shell that brings there what a profile says
ssh                     one connection a host, and its agent at the other end
slurm, slurm_script     the batch script of a job, and submitting it

What happens on a node is mempar.runtime.launch's; nothing here imports torch.
"""
