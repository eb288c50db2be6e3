"""PyIceberg's requests to the storage count as progress: so a slow storage is not taken for a hung one."""

from pyiceberg.io.pyarrow import PyArrowFile, PyArrowFileIO

from k2flow.timeouts import REQUESTS

_new_input, _new_output = PyArrowFileIO.new_input, PyArrowFileIO.new_output


def install_requests() -> None:
    """Install the count for this whole process. Arrow's FileIO is counted, the others are not."""
    PyArrowFileIO.new_input = _counted_input  # type: ignore[method-assign]
    PyArrowFileIO.new_output = _counted_output  # type: ignore[method-assign]


def _counted_input(self: PyArrowFileIO, location: str) -> PyArrowFile:
    REQUESTS.made()
    return _new_input(self, location)


def _counted_output(self: PyArrowFileIO, location: str) -> PyArrowFile:
    REQUESTS.made()
    return _new_output(self, location)
