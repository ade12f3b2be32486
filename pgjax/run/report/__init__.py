"""The report page of runs: what it is made of (`page`), what a run was made with (`versions`), and its own script and style."""
