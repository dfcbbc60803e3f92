"""What codecs know beforehand, kept in the folder by the first engine that saves.

Later engines take that over, or their blocks would not be each other's.
"""

import os
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Generic, Self, TypeVar

import numpy as np
import torch
from blake3 import blake3

from vllm_int8kv.store.files import BadFile

DIGEST_BYTES = 8


class Kept(ABC):
    """Arrays in a file of their own."""

    name: ClassVar[str]
    """of the file"""

    @abstractmethod
    def arrays(self) -> Mapping[str, np.ndarray]:
        """What the file holds."""

    @classmethod
    @abstractmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        """The inverse of `arrays`. Raises KeyError or ValueError for other ones."""

    @cached_property
    def digest(self) -> bytes:
        """What tells these arrays from others."""
        hashed = blake3()
        for array in self.arrays().values():
            hashed.update(array.tobytes())
        return hashed.digest(length=DIGEST_BYTES)

    def write(self, folder: Path) -> None:
        """Write a file that is not there yet, whole or not at all; another engine may be faster.

        Raises:
            OSError: the folder cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{self.name}.{os.urandom(8).hex()}"
        try:
            with temporary.open("wb") as file:
                np.savez(file, **self.arrays())
            os.link(temporary, folder / self.name)
        except FileExistsError:
            return
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """What a folder keeps.

        Raises:
            FileNotFoundError: nobody has saved anything.
            BadFile: the file holds something else.
        """
        path = folder / cls.name
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return cls.from_arrays(dict(arrays))
        except FileNotFoundError:
            raise
        except (OSError, ValueError, EOFError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
            raise BadFile(f"{path} cannot be read ({error})") from None


K = TypeVar("K", bound=Kept)


class KeptInFolder(Generic[K]):
    """What one namespace keeps.

    Args:
        folder: of the namespace.
        kind: of what it keeps.
        measure: makes it from the first inputs that are saved, of every layer `[..., hidden_size]`.
    """

    def __init__(self, folder: Path, kind: type[K], measure: Callable[[Sequence[torch.Tensor]], K]) -> None:
        self._folder, self._kind = folder, kind
        self._measure: Callable[[Sequence[torch.Tensor]], K] | None = measure
        self._found: K | None = None

    def known(self) -> K:
        """What blocks were saved with.

        Raises:
            BadFile: there is nothing, so that no block can be read.
        """
        if self._found is None:
            try:
                self._found = self._kind.read(self._folder)
            except FileNotFoundError:
                raise BadFile(f"{self._folder / self._kind.name} is gone, which says how to read it") from None
            self._measure = None  # it may hold as much memory as what it makes
        return self._found

    def known_or_measured(self, inputs: Sequence[torch.Tensor]) -> K:
        """What blocks were saved with, or what the first of them say.

        Raises:
            BadFile: there is something that cannot be read.
            OSError: nothing new can be written.
        """
        if self._found is None:
            if not (self._folder / self._kind.name).exists():
                self._measure(inputs).write(self._folder)
            self.known()
        return self._found
