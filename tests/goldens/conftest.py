"""The scripts that make the goldens need torch: they are not collected for doctests."""

collect_ignore = ["make_families.py", "make_lora.py", "make_models.py", "make_reward_models.py"]
