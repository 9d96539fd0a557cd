from raycifar.cluster.sizing import objection, versions

__all__ = ["objection", "versions"]
