"""The configuration tree: schema, loading, checks between sections."""
