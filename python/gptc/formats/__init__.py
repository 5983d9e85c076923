"""Models in the formats of other programs, a module each, behind one interface: registry.py."""
