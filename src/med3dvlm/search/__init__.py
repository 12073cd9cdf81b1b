"""Search: an index of embedded studies, and how it is built."""

from med3dvlm.search.build import BuildResult, build_index
from med3dvlm.search.index import Hit, SearchIndex, SearchIndexError, Study

__all__ = [
    "BuildResult",
    "Hit",
    "SearchIndex",
    "SearchIndexError",
    "Study",
    "build_index",
]
