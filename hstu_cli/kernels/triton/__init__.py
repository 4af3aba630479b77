"""What all Triton kernels share: whether they can run, their chips, their launch settings, compilation ahead of time.

The kernels themselves are in each operator's folder, in `triton.py`. Nothing here imports triton when it is loaded.
"""
