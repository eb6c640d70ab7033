"""The commands of `batchllm`, a module for each kind; `batchllm_flows.cli` puts them together."""
