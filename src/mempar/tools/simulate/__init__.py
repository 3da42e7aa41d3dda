"""`mempar plan --simulate`: a discrete-event model of one training step, rank by rank.

    a Layout, its hardware  ->  pieces of passes  ->  a timeline of tasks     ->  a Simulation, a table, a trace
                                (pieces.py)           (step.py, timeline.py)      (result.py, table.py, chrome_trace.py)

Tasks wait for each other as the engine's do: the passes of a stage in megatron's order (schedule.py, pipeline.py), a
collective for its last member, a receiving stage for what is sent to it. Ranks differ by the reads that fall on their
rows (loads.py, replay.py, exchange_load.py) and by jitter. Where nodes do not hold whole groups, a collective of all
groups of a stage takes as long as the one that lies worst (groups.py). Times are integers of picoseconds, and every
task has a number for each rank of its stage, so that thousands of ranks cost little more than one. Nothing here imports
torch.

What it does not know: links that are slower than their neighbours, messages of a pipeline that share a link with
collectives, kernels that are slower while something is sent. Micro-batches that padding fills up take as long as full
ones, but for their entries. Owners read unmerged entries, as in the planner's form; what uneven reads add to that is
merged. Rows touched in a step, which are what is updated and sent between copies, are those of even reads: the most
there can be.
"""
