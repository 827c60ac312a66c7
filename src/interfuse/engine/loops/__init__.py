"""The loops that kernels are compiled from: plain loops over chunks of blocks, by Numba. Imported only to compile."""
