"""What can be known of a model without loading it: its files, its shape, and the dtype it computes in."""
