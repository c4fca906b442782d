"""Recipes that ship with modelpress: one YAML file each, and the texts that they calibrate on."""
