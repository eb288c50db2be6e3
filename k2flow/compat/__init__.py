"""Patches and private parts of third-party libraries: one module or package per library.

Each checks, when it is imported, that the library's version is one that it was tested with. An unknown version could
break a patch without an error.
"""
