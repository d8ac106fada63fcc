"""The experimental fp8 linears: operations, launches and kernels."""
