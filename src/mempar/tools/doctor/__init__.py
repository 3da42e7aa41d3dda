"""`mempar doctor`: what of this machine, or of an allocation, would stop a run or slow it down, and what to do.

Each subject has pure functions from facts to findings, which tests feed with bad facts, and a thin collector of the
facts beside them. Nothing here imports megatron or triton; torch is imported by processes of their own alone
(`device_probe`, `smoke_rank`, and `node` when it starts ranks), so that a broken driver or a hang is a finding and not
the end of the command.

finding         what is said
versions        packages and what they imply; packages.py finds them, apex.py tells two of that name apart
devices         GPUs and cores against ranks; machine.py finds them, through device_probe.py
network         interfaces, names, InfiniBand; interfaces.py finds them
disk            room, rate, locks; file_system.py knows mounts and measures
limits          ulimits, shared memory, memory
clocks          whether they are kept, whether hosts agree
smoke           collectives tried out; smoke_rank.py is a rank
needs           what a recipe wants of all this
environment     the one place that reads environment variables
looking         all of that about one machine
together        the nodes of a launch: node_commands.py reaches them, node.py runs there, across.py keeps hold of them,
                wire.py is what they say to each other, merging.py makes one list of it
command, report the command, and its table
"""
