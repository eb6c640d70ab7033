"""Settings of the planner's property tests."""

from hypothesis import settings

# The planner's loops are compiled at their first call, which takes seconds on a machine without the compiled ones.
settings.register_profile("planner", deadline=None)
settings.load_profile("planner")
