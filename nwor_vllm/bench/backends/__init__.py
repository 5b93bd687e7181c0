"""What serves a workload: real vLLM in this process, and others behind the same few methods."""
