"""What the sections of the spec share: the base model and the types of their fields."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1, strict=True)]


class Section(BaseModel):
    """A part of the spec: frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")
