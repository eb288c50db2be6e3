"""PyIceberg's requests to the storage: each counts as progress, and a small file takes one request instead of three."""

from typing import Any

import pyarrow.fs
from pyiceberg.io.pyarrow import PyArrowFile, PyArrowFileIO

from k2flow.timeouts import REQUESTS

_new_input, _new_output = PyArrowFileIO.new_input, PyArrowFileIO.new_output


class OneRequestS3(pyarrow.fs.S3FileSystem):  # type: ignore[misc]
    """Sends a file of up to 5 MB at its end, in one request. By default every file is a multipart upload."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_delayed_open": True, **options})


def install_requests() -> None:
    """Install both for this whole process. PyIceberg looks up the class of the file system when it opens one."""
    PyArrowFileIO.new_input = _counted_input  # type: ignore[method-assign]
    PyArrowFileIO.new_output = _counted_output  # type: ignore[method-assign]
    pyarrow.fs.S3FileSystem = OneRequestS3


def _counted_input(self: PyArrowFileIO, location: str) -> PyArrowFile:
    REQUESTS.made()
    return _new_input(self, location)


def _counted_output(self: PyArrowFileIO, location: str) -> PyArrowFile:
    REQUESTS.made()
    return _new_output(self, location)
