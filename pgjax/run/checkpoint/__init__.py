"""Snapshots of a run by orbax, checked to the bit, and how a run goes on from one."""
