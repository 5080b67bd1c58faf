"""The algorithm as pure functions: advantages, group selection, losses, statistics."""
