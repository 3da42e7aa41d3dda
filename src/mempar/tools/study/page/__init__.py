"""report.html and plots.png of a study: what its results show, in words, plots and tables.

`document.py` puts the page together, `plots.py` draws.
"""

from mempar.tools.study.page.document import write_page

__all__ = ["write_page"]
