"""What the steps and the formats share for working on columns: names of array types, compiled loops, types of columns
by name, over several objects and from JSON, and their values for Python and for JSON.
"""
