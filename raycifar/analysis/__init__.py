"""From a run's history to what it means. Nothing here imports Ray."""
