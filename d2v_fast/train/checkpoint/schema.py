"""What a checkpoint says of itself, and the types that its readers rely on."""

from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from d2v_fast.train.errors import CheckpointError

Count = Annotated[int, Field(strict=True, ge=0)]
Positive = Annotated[int, Field(strict=True, ge=1)]


class _Config(BaseModel):
    model: dict[str, Any]
    accumulate: Positive = 1  # later than the first files


class _Data(BaseModel):
    fingerprint: str
    description: str


class _Progress(BaseModel, extra="forbid"):
    update: Count
    epoch: Count
    index: Count


class _File(BaseModel):
    bytes: Count
    sha256: str


class Content(BaseModel):
    """What checkpoints of all versions hold besides tensors; other keys may be there."""

    config: _Config
    data: _Data
    progress: _Progress
    world_size: Positive


class Manifest(Content):
    """What ``manifest.json`` holds."""

    same: dict[str, str]  # tensors that are not saved -> those that are the same
    files: dict[str, _File]


def check_content(kind: type[Content], content: Any, what: str) -> None:
    """Refuse ``content`` unless its values have the types of ``kind``; ``what`` names it.

    Raises:
        CheckpointError: a value is missing or of another type.
    """
    try:
        kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        got = "" if first["type"] == "missing" else f", got {first['input']!r:.100}"
        raise CheckpointError(f"{what} is damaged: {'.'.join(map(str, first['loc']))}: {first['msg']}{got}") from None
