"""What the steps share for working on columns: names of array types, compiled loops, names of column types."""
