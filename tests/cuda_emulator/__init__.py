"""A CUDA emulator: README.md says what it is; build.py makes libraries of .cu files."""
