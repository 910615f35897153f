"""The command line and the presets."""
