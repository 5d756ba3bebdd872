"""Questions with solutions, grouped by what they ask and searched by similarity."""

from kvc.data.clustering.query import ClusterQuery, LIMOClusterQuery

__all__ = ["ClusterQuery", "LIMOClusterQuery"]
