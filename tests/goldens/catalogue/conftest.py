"""The scripts that make these goldens need the peers themselves: they are not collected for doctests."""

collect_ignore_glob = ["make_*.py"]
