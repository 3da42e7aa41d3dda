"""What the HTML pages of commands have in common: one file with its plots inside, no network, no other file.

`document.py` makes a page of plots (`plot.py`, drawn by `svg.py`) and tables (`tables.py`); `picture.py` draws
its plots into one PNG; `axes.py` has what plots share. What is shown, and in which words, is each command's own.
"""
