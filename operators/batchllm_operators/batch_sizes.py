"""How many rows are read at a time, wherever rows are read."""

ROWS_AT_A_TIME = 1024
"""Rows with texts or token ids. With tens of kB a row they take some tens of MB, a batch costs little beside them, and
its buffers are small enough to be used again instead of mapped anew, which halves the time of reading."""

NUMBERS_AT_A_TIME = 65_536
"""Rows of which only keys and numbers are read: with tens of bytes a row they take some MB as well."""

REQUESTS_AT_A_TIME = 256
"""Requests that are read ahead of an engine: as Python integers their prompts take about 36 bytes a token."""
