"""Processes of a run: how they are started, watched, told to stop, and what is said when they end.

local        starts the ranks of this machine
worker       is a rank
stopping     signals and the time limit, as wishes that ranks agree about
heartbeat    signs of life, rank by rank
supervisor   passes signals on and ends what does not end
endings      tells causes from consequences, in one message
lock         one writer in a run's directory
parent       dying with one's parent
"""
