"""Search: an index of embedded studies, and how it is built."""

from med3dvlm.search.build import BuildResult, How, build_index, rebuild_index
from med3dvlm.search.index import SearchIndex
from med3dvlm.search.study import Embedder, Hit, SearchIndexError, Study

__all__ = [
    "BuildResult",
    "Embedder",
    "Hit",
    "How",
    "SearchIndex",
    "SearchIndexError",
    "Study",
    "build_index",
    "rebuild_index",
]
