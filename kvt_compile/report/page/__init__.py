"""`Report` -> one HTML page, or one SVG picture, that needs nothing else: no network, no other file.

`Report.to_html` and `Report.to_svg` are the ways in.
"""

from kvt_compile.report.page.build import page
from kvt_compile.report.page.svg import graph_svg

__all__ = ["graph_svg", "page"]
