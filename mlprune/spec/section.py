"""What the sections of the spec share: the base model and the types of their fields."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1, le=1_000_000, strict=True)]  # of lines, samples, trials: a loop ends


class Section(BaseModel):
    """A part of the spec: frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")
