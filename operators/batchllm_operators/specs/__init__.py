"""The parts of a job's spec, for all steps to import; a spec imports no step."""
