"""The report of a job as one HTML page with plots: no network, no script.

`page` is what the flows call; `plots` draws, `step_trace` reads what the engines wrote of their steps, and
`page.html.j2` is the page.
"""
