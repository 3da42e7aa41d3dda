"""`mempar launch`: a run on other machines, through ssh or a scheduler.

profile, profile_file   what a cluster needs to know of itself
provenance              what a run came from, as it is saved before anything starts
slurm                   the batch script of a job, and submitting it
slurm_script            the part of it that is the same for all jobs

What happens on a host is mempar.runtime.launch's; nothing here imports torch.
"""
