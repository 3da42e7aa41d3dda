"""`mempar study recall`: does memory pay? Models of equal FLOPs a token learn facts and are asked for them.

The facts are those of the Unicode character database, which every Python has (`facts.py`), told in several wordings of
which every fact is asked in one that it was never told in (`wordings.py`). `corpus.py` makes tokenizer, training data
and questions of them, `variants.py` the models, `plan.py` the runs of a study; `one_run.py` is a run, a process of its
own, and `schedule.py` keeps several of them going. `results.py` is what a run leaves behind,
`comparison.py` joins seeds and compares models, `summary.py` says in words what all of them show, and `page/` draws it.
"""
