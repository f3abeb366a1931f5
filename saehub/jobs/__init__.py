"""Everything long: one table of kinds, one row per job, one `run()`. Imports no app but saehub.accounts."""
