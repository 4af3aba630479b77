"""C++ implementation of the operators for CPUs: built on the user's machine, then loaded."""
