"""Placeholder replaced by the structure discovery."""
