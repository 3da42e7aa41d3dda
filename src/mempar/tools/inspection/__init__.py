"""`mempar inspect`: what is in the memories of a checkpoint, and what texts read from them.

    checkpoint --- history.py, rows.py: streams of rows -------------.
    texts, data -- texts.py --- lookups.py: the model reads them ----+--> findings.py --- report.py: tables
                                reads.py, overlap.py: sums of it ----'        |---------- page/: HTML and PNG

Tables are never loaded: rows come in blocks, or through the mapped files. `command.py` joins the parts.
"""
