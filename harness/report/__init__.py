"""Reports, always derived from the store."""
