"""`mempar eval`: what a checkpoint knows, by the tasks of lm-evaluation-harness and by its loss on prepared data.

command        from the arguments to a table and a file; options is the command line
tasks          the harness's tasks, ours and those of a directory: found, checked, loaded
harness_model  what the harness asks of a model, on the engine
rows           requests as tokens: what is read and what of it is scored
workers, work  opened models in this process or several, and what they compute
heldout        loss and bits per byte of prepared data
published      figures of the paper;  report  the table and the file
answers, tasks/*.yaml   tasks that the harness does not have
"""
