"""The steps of a job, each usable on its own: stage, plan, execute, merge."""
