"""Devices and processes: the mesh, what splits over it, which rows a process holds, and how processes exchange values."""
