"""Figures of the attention kernels: a model of their traffic, and measurements where there is a device."""
