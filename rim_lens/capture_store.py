"""Where captured rows go: arrays in memory, or one netCDF file that grows row by row and can be resumed."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rim_lens.chat.spans import SpanBatch
from rim_lens.errors import CaptureError
from rim_lens.hooks.readers import Variable

if TYPE_CHECKING:
    import xarray as xr

FILE = "capture.nc"


def labelled(variables: Sequence[Variable], batch: SpanBatch) -> dict[str, Any]:
    """Coordinates of a capture: prompt ids and what is known of each prompt, and the readers' own labels."""
    sizes = {dim: size for v in variables for dim, size in zip(v.dims, v.shape, strict=True)}
    return {
        **{dim: np.arange(size) for dim, size in sizes.items()},
        **{dim: list(names) for v in variables for dim, names in v.coords.items()},
        "prompt": [prompt.id for prompt in batch.prompts],
        "category": ("prompt", [prompt.category for prompt in batch.prompts]),
        "family": ("prompt", [prompt.family for prompt in batch.prompts]),
        "kind": ("prompt", [prompt.kind for prompt in batch.prompts]),
        "n_tokens": ("prompt", batch.lengths.numpy()),
    }


class MemoryStore:
    """Rows in memory."""

    def __init__(
        self, variables: Sequence[Variable], coords: Mapping[str, Any], attrs: Mapping[str, Any]
    ) -> None:
        self._variables, self._coords, self._attrs = variables, coords, attrs
        n_prompts = len(coords["prompt"])
        self._arrays = {v.name: np.empty((n_prompts, *v.shape), dtype=v.dtype) for v in variables}

    def missing(self) -> list[int]:
        """Rows still to be read."""
        return list(range(len(self._coords["prompt"])))

    def write(self, rows: Sequence[int], values: Mapping[str, np.ndarray]) -> None:
        """Store some rows."""
        for name, value in values.items():
            self._arrays[name][list(rows)] = value

    def close(self) -> None:
        """Nothing to do."""

    def dataset(self) -> xr.Dataset:
        """All rows, labelled."""
        import xarray as xr

        return xr.Dataset(
            {v.name: (("prompt", *v.dims), self._arrays[v.name], dict(v.attrs)) for v in self._variables},
            coords=self._coords,
            attrs=dict(self._attrs),
        )


class DiskStore:
    """Rows in ``folder/capture.nc``. A row counts as stored only after all its numbers are.

    Raises:
        CaptureError: The file holds another capture, or is corrupt; or the folder is a file.
    """

    def __init__(
        self, folder: Path, variables: Sequence[Variable], coords: Mapping[str, Any], attrs: Mapping[str, Any]
    ) -> None:
        self.path = folder / FILE
        fingerprint = _fingerprint(variables, coords, attrs)
        if folder.is_file():
            raise CaptureError(
                f"out={str(folder)!r} is a file; a capture is streamed into a folder. Name one."
            )
        if not self.path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            _create(self.path, variables, coords, {**attrs, "fingerprint": fingerprint})
        self._stored, found = _look(self.path)
        if found != fingerprint:
            raise CaptureError(
                f"{self.path} holds another capture (other prompts, readers, editors, hooks on the model, weights, versions, or"
                " way of computing attention). Give an empty folder, or delete that file."
            )
        # A finished file is not opened for writing: a dataset opened from it earlier may still be in use.
        self._file = None if self._stored.all() else _open_to_write(self.path)

    def missing(self) -> list[int]:
        """Rows still to be read."""
        return np.flatnonzero(~self._stored).tolist()

    def write(self, rows: Sequence[int], values: Mapping[str, np.ndarray]) -> None:
        """Store some rows, in rising order: numbers first, then the mark that they are there."""
        if self._file is None:
            raise CaptureError(f"{self.path} is complete; there is nothing left to write.")
        places = list(rows)
        for name, value in values.items():
            self._file.variables[name][places] = value
        self._file.flush()
        self._file.variables["stored"][places] = np.ones(len(places), dtype="int8")
        self._file.flush()

    def close(self) -> None:
        """Close the file, also when the capture was cut short."""
        if self._file is not None:
            self._file.close()
            self._file = None


def open_capture(folder: str | Path) -> xr.Dataset:
    """Open a capture that was streamed to a folder; arrays are read when used.

    Raises:
        CaptureError: There is none, it is corrupt, or it was cut short.
    """
    import xarray as xr

    path = Path(folder) / FILE
    if not path.exists():
        raise CaptureError(f"{path} does not exist; give the folder that rl.capture(out=...) wrote.")
    stored, _ = _look(path)
    if not stored.all():
        raise CaptureError(
            f"{path} holds {int(stored.sum())} of {stored.size} prompts: the capture was cut short. Run the same"
            " rl.capture call again; it goes on where it stopped."
        )
    try:
        return xr.open_dataset(path, engine="h5netcdf").drop_vars("stored")
    except Exception as error:
        raise _corrupt(path, error) from error


def _corrupt(path: Path, error: Exception) -> CaptureError:
    return CaptureError(f"{path} is not a capture, or is corrupt ({error}). Delete it and capture again.")


def _in_use(path: Path, error: OSError) -> CaptureError:
    return CaptureError(
        f"{path} cannot be opened ({error}): another process is capturing into it. Wait for it to end."
    )


def _open_to_write(path: Path) -> Any:
    import h5netcdf

    try:
        return h5netcdf.File(path, "a")
    except BlockingIOError as error:
        raise _in_use(path, error) from error


def _look(path: Path) -> tuple[np.ndarray, str]:
    import h5netcdf

    try:
        with h5netcdf.File(path, "r") as file:
            return np.asarray(file.variables["stored"][:]).astype(bool), str(file.attrs["fingerprint"])
    except BlockingIOError as error:
        raise _in_use(path, error) from error
    except Exception as error:  # damage shows as any of them: OSError, KeyError, RuntimeError, ValueError …
        raise _corrupt(path, error) from error


def _fingerprint(variables: Sequence[Variable], coords: Mapping[str, Any], attrs: Mapping[str, Any]) -> str:
    labels = {name: list(coords[name][1]) for name in ("category", "family", "kind")}
    told = {**attrs, "attention": str(attrs["attention"]).split()[0]}  # the way, not why it was taken
    what = json.dumps(
        [[repr(variable) for variable in variables], list(coords["prompt"]), labels, told],
        sort_keys=True,
        default=str,
    )
    return hashlib.sha256(what.encode()).hexdigest()[:16]


def _create(
    path: Path, variables: Sequence[Variable], coords: Mapping[str, Any], attrs: Mapping[str, Any]
) -> None:
    import h5netcdf
    import xarray as xr

    # Two runs may begin at once: each makes a file of its own, and the first that is there is that of both.
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    stored = ("prompt", np.zeros(len(coords["prompt"]), dtype="int8"))
    try:
        xr.Dataset({"stored": stored}, coords=coords, attrs=dict(attrs)).to_netcdf(
            unfinished, engine="h5netcdf"
        )
        with h5netcdf.File(unfinished, "a") as file:
            for variable in variables:
                array = file.create_variable(variable.name, ("prompt", *variable.dims), dtype=variable.dtype)
                for key, value in variable.attrs.items():
                    array.attrs[key] = value
                array.attrs["coordinates"] = "category family kind n_tokens"
        try:
            os.link(unfinished, path)  # atomic: a file of this name always has all its variables
        except FileExistsError:
            pass
        except OSError:  # no links on this file system
            unfinished.rename(path)
    finally:
        unfinished.unlink(missing_ok=True)
