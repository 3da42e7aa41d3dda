"""report.html and plots.png of a study: what its results show, in words, plots and tables.

    python -m mempar.tools.study.page DIR        draws them anew from DIR/results.json and DIR/study.json

`document.py` puts the page together, `plots.py` draws.
"""

from mempar.tools.study.page.document import write_page

__all__ = ["write_page"]
