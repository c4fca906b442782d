"""Compression passes, one a file. Each is found through its entry point, never by importing this package."""
