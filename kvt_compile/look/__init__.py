"""Looking at the attention itself: which keys each query keeps, how much mass they hold, how far away they are."""

from kvt_compile.look.visualize import Figures, visualize

__all__ = ["Figures", "visualize"]
