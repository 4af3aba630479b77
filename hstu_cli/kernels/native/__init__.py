"""C++ implementation of the attention operators for CPUs: built on the user's machine, then loaded."""
