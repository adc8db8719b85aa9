"""Backbones made by the user's own code, and checks that they have a backbone's interface."""
