"""The C++ kernels of libdmdr_cpu: the default for CPU tensors."""

from dmdr_fast.backends.native import Library, library_path

LIBRARY = Library(library_path("dmdr_cpu"), "cpu")
BACKEND = LIBRARY.backend()
