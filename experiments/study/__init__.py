"""What the RLHF and over-optimisation studies need beside the stages: pairs, fits, reports."""
