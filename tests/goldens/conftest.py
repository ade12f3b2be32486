"""The script that makes the goldens needs torch: it is not collected for doctests."""

collect_ignore = ["make_models.py"]
