"""The YAML files that come with the package: `configs/` of the repository, installed beside the modules."""

from pathlib import Path

import vllm_int8kv


def folders(kind: str) -> list[Path]:
    """Where the files of a kind, `bench` or `serve`, may be: of a checkout, then of the installed package."""
    package = Path(vllm_int8kv.__file__).parent
    places = [package.parent, *map(Path, vllm_int8kv.__path__)]
    return [place / "configs" / kind for place in places if (place / "configs" / kind).is_dir()]


def find(kind: str, name: str) -> Path:
    """A configuration by its path, or by the name of one that comes with the package.

    Raises:
        ValueError: there is none; says which names there are.
    """
    path = Path(name)
    if path.is_file():
        return path
    for folder in folders(kind):
        if (found := folder / f"{name}.yaml").is_file():
            return found
    known = sorted({file.stem for folder in folders(kind) for file in folder.glob("*.yaml")})
    raise ValueError(f"{name} is no file, and none that comes with the package: {', '.join(known) or 'there are none'}")
