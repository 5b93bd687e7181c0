"""The embedded pair and scripted pairs."""
