"""Translates PTX, which nvcc makes of .cu files, to C++ that the emulator runs.

A function of PTX becomes a function of C++, with a variable for every register, a label for every
label, and for every instruction a statement made of what ``ptx.h`` defines; ``#line`` says which
line of the .cu file it comes from. Whatever is not understood is an error, never a guess.
"""

from cuda_emulator.ptx.reader import PtxError
from cuda_emulator.ptx.translator import kernels, translate

__all__ = ["PtxError", "kernels", "translate"]
