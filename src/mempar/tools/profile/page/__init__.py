"""report.html of a profile: one file with its plots inside, which needs no network and no other file.

    python -m mempar.tools.profile.page DIR        draws it anew from DIR/report.json and DIR/spans.json

Each plot is inline SVG from matplotlib (the extra `report`), its title says in words what is seen, and what there is
nothing of is said instead of drawn. `document.py` puts the page together, from what pages have in common
(`mempar.tools.page`); the other modules each draw some plots.
"""

from mempar.tools.profile.page.document import PAGE, write_page

__all__ = ["PAGE", "write_page"]
