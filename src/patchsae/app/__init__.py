"""The explorer and the dashboard."""
