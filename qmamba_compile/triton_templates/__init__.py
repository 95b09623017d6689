"""Templates of the generated Triton kernels. Nothing is here yet: on CUDA the references in `ops` run."""
