"""Medusa heads for other programs, and other programs' heads for this one."""
