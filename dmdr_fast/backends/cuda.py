"""The CUDA kernels of libdmdr_cuda."""

from dmdr_fast.backends.native import Library, library_path

try:
    LIBRARY = Library(library_path("dmdr_cuda"), "cuda")
except ImportError as error:
    raise ImportError(
        f"{error}. The CUDA kernels are built where nvcc is found; DMDR_CUDA=ON insists on them"
    ) from error
BACKEND = LIBRARY.backend()
