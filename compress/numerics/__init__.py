"""Pure tensor functions, no model in sight. Each file names its source at the top."""
