"""Replay of acceptance traces under a cost curve: any policy, and the oracles it is measured against."""
