"""inspection.html and inspection.png: findings as plots and tables, in one file that needs no network.

`document.py` puts them together from what pages have in common (`mempar.tools.page`), `memory_plots.py` draws what lies
in a memory and `text_plots.py` what texts read of it.
"""
