"""Stand-in for SGLang's CUDA kernels: SGLang imports some by name even on a CPU, but calls none there."""
